"""Memory of a GPU beside weights: what a step needs, computed from shapes, and what that leaves for
KV blocks. Nothing here asks the device; a `Meter` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from quantd.daemon.types import BLOCK_TOKENS
from quantd.daemon.worker.gpu.reserved import chunk_bytes
from quantd.daemon.worker.memory import KvPools, allocate, block_bytes
from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.models.decoder import Decoder
from quantd.kernels import ops
from quantd.plugins.api import Refused

PARTIAL_BYTES = 256 << 20
"""Most that attention's partial results take (kernels/triton/attention.py)."""
KEY_SPAN, SPLIT_TOKENS = 512, 8
"""Of those: keys of one, and rows that a sequence may have."""
SPAN, SUM_PROGRAMS, TILE = 1024, 512, 128 * 64
"""Of products with packed weights (kernels/triton/grouped.py): with fewer programs than these, each
of so many results, the sums of each span of columns are apart."""
LOGIT_ROWS = 64
"""Rows of logits at once for prompt log-probabilities."""

LIBRARY_BYTES = 256 << 20
"""Kept for what no shape says: cuBLAS's workspaces, kernels' code that is loaded later."""
_MARGIN = 32
"""The part of the device that a budget which nobody has set leaves alone: torch's allocator holds
pieces that no tensor fits into, and the device may have other users."""
_GRANULARITY = 2 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """The largest one that the scheduler may ask for."""

    tokens: int
    sequences: int
    """That are sampled at once; 0: there is no output layer."""
    context: int

    def smaller(self) -> list[Step]:
        """It, and before it those of each power of two of tokens that is less."""
        powers = (1 << i for i in range(self.tokens.bit_length()))
        sizes = [size for size in powers if size < self.tokens]
        return [replace(self, tokens=size) for size in (*sizes, self.tokens)]


@dataclass(frozen=True, slots=True)
class Costs:
    """What decides a step's bytes beside its size."""

    config: ModelConfig
    dtype: torch.dtype
    kv_dtype: torch.dtype
    is_packed: bool
    """Some layer's weights are."""
    on_gpu: bool
    bounce: int = 0
    """Bytes of the buffers by way of which blocks go to the host."""

    def step_bytes(self, step: Step) -> int:
        """Most bytes of tensors at once, of the step and of all smaller ones: sums of packed
        weights are apart where there are few rows."""
        return max(map(self._bytes, step.smaller()))

    def reserve_bytes(self, step: Step, total: int) -> int:
        """For recorded graphs, whose steps of decodes have memory of their own, for what of the
        last chunk of each pool is no block, for copies to the host, and for libraries."""
        config = self.config
        graphs = self.step_bytes(Step(max(1, step.sequences), 0, step.context))
        pools = 2 * len(config.layers)
        chunks = pools * chunk_bytes(_GRANULARITY, total // pools, pools)
        return graphs + chunks + self.bounce + LIBRARY_BYTES

    def _bytes(self, step: Step) -> int:
        config, rows = self.config, step.tokens
        hidden = rows * config.hidden_size * self.dtype.itemsize
        sequences = min(rows, max(1, step.sequences))
        # Twice: as it is uploaded, in one piece, and what is made of it.
        batch = 2 * (4 * rows * 8 + sequences * -(-step.context // BLOCK_TOKENS) * 4)
        tables = sum(rows * rope.rotary_dim * 4 for rope in config.ropes)
        layer = max(self._attention(rows, sequences, step.context), self._feed_forward(rows))
        # A layer has the residual stream, what its norm made of it, and the last block's output.
        layer += 3 * hidden + self._sums(rows)
        return batch + tables + max(layer, 2 * hidden + self._logits(step))

    def _attention(self, rows: int, sequences: int, context: int) -> int:
        config = self.config
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        copied = queries + keys if config.qk_norm is not None else 0
        size = rows * (queries + 2 * keys + copied + queries) * self.dtype.itemsize
        if not self.on_gpu:
            return size
        spans = -(-context // KEY_SPAN)
        parts = sequences * SPLIT_TOKENS * spans * config.num_heads * (config.head_dim + 2) * 4
        return size + min(parts, PARTIAL_BYTES)

    def _feed_forward(self, rows: int) -> int:
        config, size = self.config, self.dtype.itemsize
        inner, hidden = config.intermediate_size, config.hidden_size
        dense = rows * max(3 * inner, inner + hidden) * size
        moe = config.moe
        if moe is None or not any(layer.experts for layer in config.layers):
            return dense
        pairs = rows * moe.top_k
        routing = rows * moe.num_experts * (size + 4) + pairs * 8 * 8
        sparse = pairs * (3 * moe.intermediate_size + hidden) * size + rows * hidden * (size + 4)
        return max(
            dense if not all(layer.experts for layer in config.layers) else 0, routing + sparse
        )

    def _logits(self, step: Step) -> int:
        config = self.config
        if not step.sequences:
            # A pooled model's hidden states, as they are averaged.
            return 2 * step.tokens * config.hidden_size * 4
        rows = min(step.tokens, max(step.sequences, LOGIT_ROWS))
        scaled = config.logits_scale != 1.0 or config.logits_softcap is not None
        # The sampler's own in fp32; or two more where they are scaled, one after the other.
        each = self.dtype.itemsize + (8 if scaled else 4)
        return rows * (config.vocab_size * each + config.hidden_size * self.dtype.itemsize)

    def _sums(self, rows: int) -> int:
        """Of the largest product, where they are apart."""
        if not (self.is_packed and self.on_gpu):
            return 0
        return max(
            -(-columns // SPAN) * rows * width * 4 if rows * width < SUM_PROGRAMS * TILE else 0
            for columns, width in self._products()
        )

    def _products(self) -> Iterator[tuple[int, int]]:
        config = self.config
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        yield config.hidden_size, queries + 2 * keys
        yield queries, config.hidden_size
        yield config.hidden_size, 2 * config.intermediate_size
        yield config.intermediate_size, config.hidden_size


class Meter(Protocol):
    """A device that says what it has."""

    def memory(self) -> tuple[int, int]:
        """(bytes that are free now, all of its bytes)."""

    def peak(self, work: Callable[[], None]) -> int:
        """Does the work; the most bytes of tensors at once, beside those that were there before.
        MemoryError when they are not to be had."""


class CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def peak(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        try:
            work()
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None
        return torch.cuda.max_memory_allocated(self._device) - before


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes beside KV blocks."""

    weights: int
    step: int
    reserve: int
    tokens: int
    """Of the step."""


def fitting_blocks(
    kv_bytes: int | None,
    costs: Costs,
    step: Step,
    weight_bytes: int,
    decoder: Decoder,
    device: torch.device,
) -> tuple[int, tuple[str, ...]]:
    """(the KV budget in blocks, notes). Computes the largest step once, and smaller ones: what is
    compiled for a number of rows is compiled now (tests/kernels/test_triton_launches.py), and not
    when somebody waits for a token. See `fit` for errors."""
    meter = CudaMeter(device)
    # One block, and the waste block: a step here counts on the latter alone.
    pools = allocate(costs.config, costs.kv_dtype, device, 1)
    # What is made once: tables of positions, compiled kernels, libraries' workspaces.
    first = Step(1, min(1, step.sequences), step.context)
    meter.peak(partial(compute, decoder, pools, first, device))
    _, total = meter.memory()
    needs = Needs(
        weight_bytes, costs.step_bytes(step), costs.reserve_bytes(step, total), step.tokens
    )
    block = block_bytes(costs.config, costs.kv_dtype)

    def work() -> None:
        for one in step.smaller():
            compute(decoder, pools, one, device)

    size, notes = fit(kv_bytes, block, needs, meter, work, device)
    return size // block, notes


def fit(
    kv_bytes: int | None,
    block: int,
    needs: Needs,
    meter: Meter,
    work: Callable[[], None],
    device: torch.device,
) -> tuple[int, tuple[str, ...]]:
    """(bytes for KV blocks, notes), for a model whose weights are loaded. `work` is the largest
    step: where it takes more than was computed, that counts.

    Refused when it can never fit, MemoryError when it does not now.
    """
    kv_budget(kv_bytes, block, needs, meter.memory(), device)
    try:
        measured = meter.peak(work)
    except MemoryError as error:
        free, total = meter.memory()
        raise MemoryError(
            f"a step of {needs.tokens} tokens takes {needs.step} bytes by its shapes, and "
            f"{device} has {free} of its {total} free, but: {error}"
        ) from None
    notes: tuple[str, ...] = ()
    if measured > needs.step:
        notes = (
            f"a step of {needs.tokens} tokens takes {measured} bytes where {needs.step} were "
            "computed from its shapes: there is so much less for KV blocks",
        )
        needs = replace(needs, step=measured)
    return kv_budget(kv_bytes, block, needs, meter.memory(), device), notes


def kv_budget(
    kv_bytes: int | None,
    block: int,
    needs: Needs,
    memory: tuple[int, int],
    device: torch.device,
) -> int:
    """Bytes for KV blocks: `kv_bytes`, or what is left but for a margin."""
    free, total = memory
    margin = total // _MARGIN if kv_bytes is None else 0
    beside = needs.step + needs.reserve + margin
    left = free - beside
    wanted = block if kv_bytes is None else kv_bytes
    if wanted <= left:
        return left if kv_bytes is None else kv_bytes
    error = Refused if wanted > total - needs.weights - beside else MemoryError
    what = f"one KV block takes {block}" if kv_bytes is None else f"kv_bytes is {kv_bytes}"
    raise error(
        f"{what}, more than the {max(0, left)} bytes that {device} has left: {free} of its {total} "
        f"are free beside weights of {needs.weights}, a step of {needs.tokens} tokens takes "
        f"{needs.step}, and {needs.reserve + margin} are kept for graphs, copies, libraries and as "
        "a margin"
    )


@torch.inference_mode()
def compute(decoder: Decoder, pools: KvPools, step: Step, device: torch.device) -> None:
    """Computes prompts of `step.tokens` tokens in all, and logits as when they are sampled. All
    keys and values go into the waste block."""
    waste, width = pools.waste_block, -(-step.context // BLOCK_TOKENS)
    lengths = [step.context] * (step.tokens // step.context)
    if step.tokens % step.context:
        lengths.append(step.tokens % step.context)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    batch = ops.AttentionBatch(
        starts.to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.full((len(lengths), width), waste, dtype=torch.int32, device=device),
        (waste * BLOCK_TOKENS + positions % BLOCK_TOKENS).to(device),
        positions.to(device),
    )
    tokens = torch.zeros(step.tokens, dtype=torch.int64, device=device)
    rows: Tensor | None = None
    if step.sequences:
        rows = torch.arange(min(step.tokens, max(step.sequences, LOGIT_ROWS)), device=device)
    hidden = decoder.forward(tokens, batch, step.context, pools, rows)
    if rows is not None:
        logits = decoder.logits(hidden)
        torch.empty(logits.shape, dtype=torch.float32, device=device)  # the sampler's own
