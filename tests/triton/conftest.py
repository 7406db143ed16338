"""Triton kernels in its interpreter, which needs no GPU: `make test-triton`.

TRITON_INTERPRET must be set before a kernel is defined, so these tests have a process of their own.
The interpreter computes bfloat16 wrongly (it takes the bits for integers in products), so tests use
float16 and float32.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def a_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
