"""Whether the kernels for GPUs can be used. Imports none: that takes a quarter of a second."""

import importlib.util
from functools import cache


@cache
def triton_problem() -> str | None:
    """Why the kernels in Triton cannot be used in this process, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
