"""Rows of everything that may be asked of a sampler, and what queued work may not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from quantd.daemon.types import Sampled, SamplingParams
from quantd.daemon.worker.gpu.sampler import DeviceSampler, Outcome
from quantd.daemon.worker.sampler import Bits, SampleRow

NUM_ROWS = 24


def mixed_row(seq: int, random: np.random.Generator, vocab: int) -> SampleRow:
    def some(value: Any, off: Any, share: float = 0.3) -> Any:
        return value if random.random() < share else off

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(random.integers(0, vocab, count).tolist())

    prompt, output = int(random.integers(1, 40)), int(random.integers(0, 20))
    known = [*tokens(prompt + output)]
    biased = dict(zip(tokens(9), random.uniform(-9, 9, 9).tolist(), strict=True))
    params = SamplingParams(
        max_tokens=99,
        seed=int(random.integers(-(2**63), 2**63 - 1)),
        temperature=some(float(random.uniform(0.1, 2)), some(9e-6, 0.0), 0.6),
        top_p=some(float(random.uniform(0.2, 1)), 1.0),
        top_k=some(some(2**40 + 1, int(random.integers(1, vocab + 3))), 0),
        min_p=some(float(random.uniform(0, 0.5)), 0.0),
        repetition_penalty=some(float(random.uniform(0.5, 2)), 1.0),
        presence_penalty=some(float(random.uniform(-2, 2)), 0.0),
        frequency_penalty=some(float(random.uniform(-2, 2)), 0.0),
        logit_bias=some(tuple(biased.items()), ()),
        min_tokens=some(output + 2, 0),
        stop_token_ids=(*tokens(vocab // 2), vocab + 5),
        allowed_token_ids=some(tokens(vocab // 4), None, 0.2),
        bad_words=some((tokens(1), (*known[-2:], 5), (*known[-1:], 7), (known[-1], 2, 3)), ()),
        logprobs=some(int(random.integers(0, vocab + 2)), None),
    )
    return SampleRow(seq, params, known, prompt)


def mixed_logits(random: np.random.Generator, vocab: int, width: int) -> torch.Tensor:
    """fp32 [NUM_ROWS, width]: NaN from `vocab` on, in the rows 1 and 2 NaN and infinity, in row 3
    nothing but -infinity, in row 4 some of it; every other row has many equal ones."""
    logits = torch.from_numpy(random.normal(0, 3, (NUM_ROWS, width)).astype(np.float32))
    logits[::2] = logits[::2].round()
    logits[1, vocab - 1], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, ::3] = -torch.inf
    logits[:, vocab:] = torch.nan
    return logits


def mixed_masks(random: np.random.Generator, vocab: int) -> dict[int, Bits]:
    """Of every third row; that of row 6 allows nothing."""
    words = -(-vocab // 32)
    masks = {
        i: random.integers(-(2**31), 2**31 - 1, words, dtype=np.int32)
        for i in range(0, NUM_ROWS, 3)
    }
    masks[6][:] = 0
    return masks


def on_device(arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def sampled(
    sampler: DeviceSampler,
    logits: torch.Tensor,
    rows: Sequence[SampleRow],
    masks: Mapping[int, Bits],
    run: Callable[[Callable[[], Outcome]], Outcome] = lambda work: work(),
) -> list[Sampled]:
    """What a runner does, with `run` for the queue."""
    plan = sampler.stage(rows, masks)
    tensors = on_device(plan.arrays)
    return sampler.read(plan, run(lambda: sampler.run(logits, tensors, plan)), rows)


_WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), name
        assert name not in _WAITING, name
        return func(*args, **(kwargs or {}))
