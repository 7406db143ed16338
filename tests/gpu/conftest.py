"""`make test-gpu`; on a CPU, for the tests' own sake: `make test-gpu-dry`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gpu_harness
import pytest
import torch

from quantd.kernels import ops


@pytest.fixture(autouse=True, scope="session")
def specifications_that_may_read() -> Iterator[None]:
    """On a CPU specifications that read what they are given stand for kernels that read nothing on
    the host."""
    if not gpu_harness.ON_CPU:
        yield
        return
    from numerics.fake_queue import reads_allowed

    def reading(specification: Any) -> Any:
        def operation(*arguments: Any) -> Any:
            with reads_allowed():
                return specification(*arguments)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sample_rows", "paged_attention", "expert_feed_forward"):
            patch.setattr(ops, name, reading(getattr(ops, name)))
        yield


@pytest.fixture(autouse=True)
def a_seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if gpu_harness.ON_CPU:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if not gpu_harness.ON_CPU:
        torch.cuda.empty_cache()


@pytest.fixture(params=gpu_harness.DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
