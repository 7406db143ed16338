"""The sampler of a device by its kernel, as queued work that waits for nothing."""

import numpy as np
import pytest
import torch
from numerics.mixed_rows import (
    NUM_ROWS,
    NoWaiting,
    mixed_logits,
    mixed_masks,
    mixed_row,
    sampled,
)

from quantd.daemon.worker.gpu.sampler import DeviceSampler, Outcome
from quantd.daemon.worker.sampler import Sampler
from quantd.kernels import ops
from quantd.kernels.triton import sampling

VOCAB = 101

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")


@pytest.fixture(autouse=True)
def by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK", 64)
    monkeypatch.setattr(ops, "_other", lambda specification, x: sampling.sample_rows)


def _queued(work: object) -> Outcome:
    with NoWaiting():
        return work()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("seed", range(3))
def test_the_same_as_on_a_cpu(seed: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(seed)
    rows = [mixed_row(i, random, VOCAB) for i in range(NUM_ROWS)]
    device, cpu = DeviceSampler(VOCAB), Sampler(VOCAB)
    for _ in range(2):
        logits = mixed_logits(random, VOCAB, VOCAB + 3).to(dtype)
        masks = mixed_masks(random, VOCAB)
        want = cpu.sample(logits, rows, masks)
        assert sampled(device, logits, rows, masks, _queued) == want
        for one, result in zip(rows, want, strict=True):
            one.tokens.append(result.token)
