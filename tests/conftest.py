"""Which device the tests run on, and that nothing of hypothesis goes by the clock.

The device is `QUANTD_TEST_DEVICE`, cpu or cuda.

By default GPUs are hidden, from this process and from those that it starts, so that what is tested
is the same on every machine. `make test-gpu` shows them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # the environments of client frameworks have none
    from hypothesis import HealthCheck, settings

    # By default an example has 200 ms: a machine that does other things meanwhile would fail.
    settings.register_profile("quantd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("quantd")

DEVICE = os.environ.get("QUANTD_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"QUANTD_TEST_DEVICE is {DEVICE!r}, must be cpu or cuda")
if DEVICE == "cpu":  # before torch looks for them
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu":
        return
    skip = pytest.mark.skip(reason="holds of a CPU alone")
    for item in items:
        if item.get_closest_marker("cpu") is not None:
            item.add_marker(skip)
