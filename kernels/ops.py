"""The one door to the operations that the model runner needs.

Every operation has its specification in `kernels/reference`, in plain torch; what each takes, gives
and mutates is written there. This module picks the fastest right implementation for the tensors:
for float32, bfloat16 and float16 the native library (kernels/cpu) on a CPU and Triton's kernels
(kernels/triton) on a GPU, those of them that were right there at start; the specification for
all else. Tensors are contiguous unless a docstring says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from quantd.kernels import reference, sdpa
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.checked import checked, checked_for_bytes
from quantd.kernels.cpu.grouped import GroupedWeight
from quantd.kernels.cpu.library import Library, open_library
from quantd.kernels.cpu.linear import (
    LinearWeight,
    held_dtype,
    linear,
    linear_route,
    native,
    onednn_problem,
    pack_linear,
    unpack_linear,
)
from quantd.kernels.cpu.native import DTYPES, Native
from quantd.kernels.cpu.threads import OnCallerThread
from quantd.kernels.experts import (
    ExpertStack,
    StackedExperts,
    Weight,
    new_expert_stack,
    stacked_experts,
)
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.grouped_linear import (
    grouped_linear,
    grouped_problem,
    grouped_route,
    join_grouped,
    pack_grouped,
    unpack_grouped,
)
from quantd.kernels.reference import Activation, dequantize_grouped
from quantd.kernels.sampling import SamplingRows

__all__ = [
    "BLOCK_SIZE",
    "Activation",
    "AttentionBatch",
    "ExpertStack",
    "GroupedCodes",
    "GroupedWeight",
    "LinearWeight",
    "StackedExperts",
    "Weight",
    "act_and_mul",
    "SamplingRows",
    "activate",
    "add_rms_norm",
    "copy_blocks",
    "dequantize_grouped",
    "encoder_attention",
    "expert_feed_forward",
    "gather_blocks",
    "grouped_linear",
    "grouped_problem",
    "held_dtype",
    "grouped_route",
    "identity",
    "join_grouped",
    "layer_norm",
    "linear",
    "new_expert_stack",
    "notes",
    "num_threads",
    "OnCallerThread",
    "pack_grouped",
    "pack_linear",
    "paged_attention",
    "reads_nothing",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "route_experts",
    "sample_rows",
    "scatter_blocks",
    "set_num_threads",
    "stacked_experts",
    "token_logprobs",
    "unpack_grouped",
    "unpack_linear",
    "write_kv",
]


_Operation = TypeVar("_Operation", bound=Callable[..., Any])

_MAX_GPU_HEAD_DIM = 256


def _native(x: torch.Tensor) -> Native | None:
    return native() if x.is_cpu and x.dtype in DTYPES else None


def _other(specification: _Operation, x: torch.Tensor) -> _Operation:
    """The operation for what the native library does not take: on a GPU Triton's of the same
    name."""
    if x.is_cuda and x.dtype in DTYPES:
        found = checked(x.device, x.dtype).operations.get(specification.__name__, specification)
        return cast(_Operation, found)
    return specification


def _mover(specification: _Operation, x: torch.Tensor) -> _Operation:
    """The operation for blocks, which may also hold what nobody computes with: e4m3."""
    if x.is_cuda and x.dtype not in DTYPES:
        found = checked_for_bytes(x.device).operations.get(specification.__name__, specification)
        return cast(_Operation, found)
    return _other(specification, x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H], weight fp32 [H]. x may be a view [T, heads, H] of a fused buffer."""
    lib = _native(x)
    if lib is None:
        return _other(reference.rms_norm, x)(x, weight, eps)
    return lib.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x in place; returns rms_norm of that sum."""
    lib = _native(x)
    if lib is None:
        return _other(reference.add_rms_norm, x)(x, residual, weight, eps)
    return lib.add_rms_norm(x, residual, weight, eps)


def act_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up of gate_up [T, 2I] -> [T, I]."""
    lib = _native(gate_up)
    if lib is None:
        return _other(reference.act_and_mul, gate_up)(gate_up, activation)
    return lib.act_and_mul(gate_up, activation)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates q [T, Hq, D] and k [T, Hkv, D] in place; views with a contiguous last dimension."""
    lib = _native(q)
    if lib is None:
        return _other(reference.rotary, q)(q, k, cos, sin)
    return lib.rotary_write_kv(q, k, k, cos, sin, None, None, None)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Stores k and v [T, Hkv, D], views or not, at slots of the pools [blocks, Hkv, 16, D], which
    are of k's dtype, or e4m3 of what is stored divided by `kv_scale` (keys, values)."""
    lib = _native(k)
    if lib is None or k_pool.dtype != k.dtype:
        return _other(reference.write_kv, k)(k, v, k_pool, v_pool, slots, kv_scale)
    return lib.rotary_write_kv(k, k, v, None, None, k_pool, v_pool, slots)


def rotary_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """rotary(q, k, cos, sin), in place, then write_kv of the rotated k and of v, in one pass."""
    lib = _native(q)
    if lib is None or k_pool.dtype != k.dtype:
        operation = _other(reference.rotary_write_kv, q)
        return operation(q, k, v, cos, sin, k_pool, v_pool, slots, kv_scale)
    return lib.rotary_write_kv(q, k, v, cos, sin, k_pool, v_pool, slots)


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Causal attention of q [T, Hq, D], a view or not, over the pools -> [T, Hq, D]."""
    lib = _native(q)
    if lib is not None and q.shape[2] % 16 == 0 and k_pool.dtype == q.dtype:
        return lib.paged_attention(q, k_pool, v_pool, batch, scale, window, softcap, sinks)
    operation = _other(reference.paged_attention, q)
    if q.shape[2] > _MAX_GPU_HEAD_DIM:
        operation = reference.paged_attention
    return operation(q, k_pool, v_pool, batch, scale, window, softcap, sinks, kv_scale)


def copy_blocks(pools: Sequence[torch.Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """For each (source, target), one after another in order: the block `target` of every pool
    becomes what the block `source` is at that time. Pools are of one shape and dtype."""
    if pools:
        _mover(reference.copy_blocks, pools[0])(pools, copies)


def gather_blocks(pools: Sequence[torch.Tensor], blocks: Sequence[int], rows: torch.Tensor) -> None:
    """The first rows of `rows` [n, pools * numbers of a block] become these blocks of all pools,
    one pool after another in a row. Pools are of one shape, rows of their dtype."""
    _mover(reference.gather_blocks, rows)(pools, blocks, rows)


def scatter_blocks(
    rows: torch.Tensor, pools: Sequence[torch.Tensor], blocks: Sequence[int]
) -> None:
    """The way back, one row after another: a block that comes twice has the later row."""
    _mover(reference.scatter_blocks, rows)(rows, pools, blocks)


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits [n, V], a view or not -> (int64 [n], the highest logits fp32
    [n]); see `reference.sample_rows`. On a GPU nothing waits for it."""
    return _other(reference.sample_rows, logits)(logits, rows)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of logits [m, V], a view or not: the log-probability of its token fp32 [m], the
    ids int64 and log-probabilities fp32 [m, min(k, V)] of the k highest, in order. On a GPU nothing
    waits for it."""
    return reference.token_logprobs(logits, tokens, k)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x [T, H], weight and bias fp32 [H] -> [T, H] of `dtype`."""
    return _other(reference.layer_norm, x)(x, weight, bias, eps, dtype)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(x) of x [T, I], not gated -> a new tensor."""
    lib = _native(x)
    if lib is None:
        return _other(reference.activate, x)(x, activation)
    # Gated by ones. Not torch's own: it computes what is left over at the end of a buffer, or of
    # a thread's part of it, in another way, so that a row's bits would depend on the others.
    gate_up = x.new_ones(x.shape[0], 2 * x.shape[1])
    gate_up[:, : x.shape[1]] = x
    return lib.act_and_mul(gate_up, activation)


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """Attention in both directions of q, k, v [T, heads, D], views or not, each sequence over its
    rows [starts[s], starts[s + 1]) -> [T, heads, D]."""
    if q.dtype in DTYPES:
        return sdpa.encoder_attention(q, k, v, starts, scale)
    return reference.encoder_attention(q, k, v, starts, scale)


def route_experts(
    logits: torch.Tensor, top_k: int, *, softmax_before: bool, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [T, E], best first, the lower id first among equals
    -> weights fp32 and ids int64 [T, top_k]."""
    route = _other(reference.route_experts, logits)
    return route(logits, top_k, softmax_before=softmax_before, renormalize=renormalize)


def expert_feed_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    stacked: StackedExperts | None = None,
) -> torch.Tensor:
    """The sum over each row's experts, as `route_experts` chose them, of weight * expert(row): x
    [T, H] -> [T, H]; see `reference.expert_feed_forward`.

    `stacked`: the weights of all `experts` in one place on a GPU, which is then not waited for.
    Without it experts are called one after the other, and it is.
    """
    if stacked is None:
        return reference.expert_feed_forward(x, weights, ids, experts)
    if not len(x):
        return torch.empty_like(x)
    from quantd.kernels.triton.experts import feed_forward

    def act(gate_up: torch.Tensor) -> torch.Tensor:
        return act_and_mul(gate_up, stacked.activation)

    return feed_forward(x, weights, ids, stacked.gate_up, stacked.down, act)


def identity() -> tuple[str, ...]:
    """What may decide the last bits of a result on this machine: the library's level and build, and
    who multiplies bfloat16."""
    library = open_library()
    bfloat16 = linear_route(torch.device("cpu"), torch.bfloat16)
    if not isinstance(library, Library):
        return "plain torch", "", bfloat16
    return library.best_level, library.handle.quantd_sources().decode(), bfloat16


def notes(dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[str, ...]:
    """Which fast routes this machine lacks for activations of `dtype` (None: of any), and why; for
    the log and the API. With a GPU for `device` and a dtype that it has kernels for, they are
    compiled and tried now unless they have been."""
    if device is not None and device.type == "cuda":
        return checked(device, dtype).problems if dtype in DTYPES else ()
    found = []
    library = open_library()
    if not isinstance(library, Library):
        found.append(
            f"native CPU library not used ({library}): operations run in plain torch, and "
            "quantized weights are unpacked for every call. Install a C compiler, then quantd again"
        )
    problem = onednn_problem(torch.bfloat16) if dtype in (None, torch.bfloat16) else None
    if problem is not None and linear_route(torch.device("cpu"), torch.bfloat16) != "pairs":
        found.append(f"bfloat16 linear layers do without oneDNN's packed weights: {problem}")
    return tuple(found)


def reads_nothing(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """No operation of a decoder reads a tensor on the host, so that a graph can hold them all. The
    specifications do, which run where a faster operation is not to be had."""
    if device.type == "cuda":
        is_checked = dtype in DTYPES and not checked(device, dtype).problems
        return is_checked and head_dim <= _MAX_GPU_HEAD_DIM
    return native() is not None and head_dim % 16 == 0


def set_num_threads(n: int) -> None:
    """Threads for all operations of this process, torch's own included."""
    if n < 1:
        raise ValueError(f"num_threads is {n}, must be at least 1")
    torch.set_num_threads(n)


def num_threads() -> int:
    return torch.get_num_threads()
