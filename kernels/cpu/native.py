"""The native library's operations on tensors: checks what C cannot, and calls it."""

import ctypes
from collections.abc import Callable

import torch

from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.cpu.library import Library
from quantd.kernels.cpu.memory import empty_weight
from quantd.kernels.reference import Activation

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PANEL = 32
"""Columns that lie together in a weight packed for `linear` (csrc/matmul.h)."""
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_strided = (_pointer, _long, _long)
_SIGNATURES = {
    "rms_norm": (_pointer, *(_long,) * 5, _pointer, _pointer, _float, _pointer),
    "act_and_mul": (_int, _pointer, _long, _long, _pointer),
    "rotary_write_kv": (*(_long,) * 5, *_strided * 3, *(_pointer,) * 4, _long, _pointer),
    "paged_attention": (
        *(_long,) * 4,
        *_strided,
        *(_pointer, _pointer, _long),
        *(_long, _pointer, _pointer, _pointer, _long),
        *(_float, _long, _float, _pointer, _pointer),
    ),
    "linear": (_int, _long, _long, _long, _pointer, _long, *(_pointer,) * 3),
    "linear_pairs": (_long, _long, _long, _pointer, _long, *(_pointer,) * 3),
}


class Native:
    """The operations at one level of the instruction set.

    Tensors are on the CPU and of a dtype in DTYPES; sizes that disagree are a ValueError, because
    C would read beyond them. Every call uses torch's current number of threads.
    """

    def __init__(self, library: Library, level: str) -> None:
        self.level = level
        self._rms_norm = _bind(library, level, "rms_norm")
        self._act_and_mul = _bind(library, level, "act_and_mul")
        self._rotary_write_kv = _bind(library, level, "rotary_write_kv")
        self._paged_attention = _bind(library, level, "paged_attention")
        self._linear = _bind(library, level, "linear")
        self.has_pairs = hasattr(library.handle, f"quantd_linear_pairs_{level}")
        """Whether linear_pairs may be called."""
        if self.has_pairs:
            self._linear_pairs = _bind(library, level, "linear_pairs")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
            raise ValueError(f"residual must be contiguous, {x.dtype}, {tuple(x.shape)}")
        return self._norm(x, residual, weight, eps)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        width = x.shape[-1]
        _check_floats("weight", weight, width)
        if x.is_contiguous():
            inner, strides = 1, (width, 0)
        elif x.dim() == 3 and x.stride(2) == 1:
            inner, strides = x.shape[1], (x.stride(0), x.stride(1))
        else:
            x, inner, strides = x.contiguous(), 1, (width, 0)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._rms_norm(
            torch.get_num_threads(),
            DTYPES[x.dtype],
            x.data_ptr(),
            x.numel() // width,
            inner,
            *strides,
            width,
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
        )
        return out

    def act_and_mul(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, must be one of {list(_ACTIVATIONS)}")
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=gate_up.dtype)
        self._act_and_mul(
            torch.get_num_threads(),
            DTYPES[gate_up.dtype],
            _ACTIVATIONS[activation],
            gate_up.data_ptr(),
            rows,
            width,
            out.data_ptr(),
        )
        return out

    def rotary_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        k_pool: torch.Tensor | None,
        v_pool: torch.Tensor | None,
        slots: torch.Tensor | None,
    ) -> None:
        """Rotates when there are tables, writes when there are pools; each half may be absent."""
        rows, kv_heads, head_dim = k.shape
        half = num_blocks = 0
        if cos is not None and sin is not None:
            half = cos.shape[1]
            _check_floats("cos", cos, rows * half)
            _check_floats("sin", sin, rows * half)
        if q.shape[0] != rows or q.shape[2] != head_dim or 2 * half > head_dim:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos width {half}: disagree")
        if k_pool is not None and v_pool is not None and slots is not None:
            if v.shape != k.shape:
                raise ValueError(f"v is {tuple(v.shape)}, k is {tuple(k.shape)}")
            _check_pools(k_pool, v_pool, kv_heads, head_dim, k.dtype)
            num_blocks = k_pool.shape[0]
            if slots.dtype != torch.int64 or slots.shape != (rows,) or not slots.is_contiguous():
                raise ValueError(f"slots must be contiguous int64 with {rows} elements")
        problem = self._rotary_write_kv(
            torch.get_num_threads(),
            DTYPES[k.dtype],
            rows,
            q.shape[1],
            kv_heads,
            head_dim,
            half,
            *_rows(q, k.dtype),
            *_rows(k, k.dtype),
            *_rows(v, k.dtype),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            None if k_pool is None else k_pool.data_ptr(),
            None if v_pool is None else v_pool.data_ptr(),
            num_blocks,
            None if slots is None else slots.data_ptr(),
        )
        _raise(problem, f"a slot is outside the pool of {num_blocks} blocks")

    def paged_attention(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As the reference; the head size must be a multiple of 16."""
        rows, heads, head_dim = q.shape
        kv_heads = k_pool.shape[1]
        _check_pools(k_pool, v_pool, kv_heads, head_dim, q.dtype)
        if heads % kv_heads or head_dim % 16:
            raise ValueError(f"{heads} heads of {head_dim} over {kv_heads} KV heads")
        if sinks is not None:
            _check_floats("sinks", sinks, heads)
        sequences = batch.kv_len.shape[0]
        for name, size in (("query_start", sequences + 1), ("kv_len", sequences)):
            _check_int32(name, getattr(batch, name), size)
        _check_int32("block_table", batch.block_table, sequences * batch.block_table.shape[1])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        problem = self._paged_attention(
            torch.get_num_threads(),
            DTYPES[q.dtype],
            rows,
            heads,
            kv_heads,
            head_dim,
            *_rows(q, q.dtype),
            k_pool.data_ptr(),
            v_pool.data_ptr(),
            k_pool.shape[0],
            sequences,
            batch.query_start.data_ptr(),
            batch.kv_len.data_ptr(),
            batch.block_table.data_ptr(),
            batch.block_table.shape[1],
            scale,
            0 if window is None else window,
            0.0 if softcap is None else softcap,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        _raise(problem, "query_start, kv_len or block_table points outside the rows or the pool")
        return out

    def linear(
        self, x: torch.Tensor, panels: torch.Tensor, n: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, K] times the weight packed by pack_panels, plus bias [n] -> [T, n] of x's dtype.
        The weight may be held in any of DTYPES: it is widened while it is multiplied."""
        rows, k = x.shape
        if panels.shape[1] != k or x.dtype not in DTYPES or panels.dtype not in DTYPES:
            shape = (n, panels.shape[1])
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, weight {panels.dtype} {shape}")
        x, bias, out = _operands(x, bias, n)
        problem = self._linear(
            torch.get_num_threads(),
            DTYPES[x.dtype],
            DTYPES[panels.dtype],
            rows,
            k,
            n,
            x.data_ptr(),
            x.stride(0),
            panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        _raise(problem, "")
        return out

    def linear_pairs(
        self, x: torch.Tensor, pairs: torch.Tensor, n: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, K] times the weight packed by pack_pairs, plus bias [n] -> [T, n], all bfloat16."""
        rows, k = x.shape
        if pairs.shape[1] != (k + 1) // 2 or {x.dtype, pairs.dtype} != {torch.bfloat16}:
            shape = (n, f"2 * {pairs.shape[1]}")
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, weight {pairs.dtype} {shape}")
        x, bias, out = _operands(x, bias, n)
        problem = self._linear_pairs(
            torch.get_num_threads(),
            DTYPES[x.dtype],
            rows,
            k,
            n,
            x.data_ptr(),
            x.stride(0),
            pairs.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        _raise(problem, "")
        return out


def _operands(
    x: torch.Tensor, bias: torch.Tensor | None, n: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x with contiguous rows, bias of its dtype, and room for the result."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        if bias.shape != (n,):
            raise ValueError(f"bias is {tuple(bias.shape)}, must be ({n},)")
    return x, bias, torch.empty((x.shape[0], n), dtype=x.dtype)


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as [ceil(N / PANEL), K, PANEL], padded with zeros."""
    n, k = weight.shape
    whole = n // PANEL
    panels = empty_weight((-(-n // PANEL), k, PANEL), weight.dtype)
    panels[:whole] = weight[: whole * PANEL].view(whole, PANEL, k).transpose(1, 2)
    if n % PANEL:
        panels[whole] = 0
        panels[whole, :, : n % PANEL] = weight[whole * PANEL :].T
    return panels


def unpack_panels(panels: torch.Tensor, n: int) -> torch.Tensor:
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n].contiguous()


def pack_pairs(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as [ceil(N / PANEL), ceil(K / 2), PANEL, 2], padded with zeros."""
    n, k = weight.shape
    count = k // 2
    pairs = empty_weight((-(-n // PANEL), -(-k // 2), PANEL, 2), weight.dtype)
    for panel, to in enumerate(pairs.transpose(1, 2)):  # to [PANEL, pairs, 2]
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        to[: len(rows), :count] = rows[:, : 2 * count].view(len(rows), count, 2)
        if k % 2:
            to[: len(rows), count, 0] = rows[:, -1]
    return pairs


def unpack_pairs(pairs: torch.Tensor, n: int, k: int) -> torch.Tensor:
    return pairs.transpose(1, 2).reshape(-1, 2 * pairs.shape[1])[:n, :k].contiguous()


def _bind(library: Library, level: str, name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(library.handle, f"quantd_{name}_{level}")
    function.argtypes = (_int, _int, *_SIGNATURES[name])  # type: ignore[attr-defined]
    return function


def _rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Address and strides of [T, heads, D], whose last dimension must be contiguous."""
    if x.dtype != dtype or x.stride(2) != 1:
        raise ValueError(f"{x.dtype} with strides {x.stride()}, must be {dtype}, last stride 1")
    return x.data_ptr(), x.stride(0), x.stride(1)


def _check_floats(name: str, x: torch.Tensor, size: int) -> None:
    if x.dtype != torch.float32 or x.numel() != size or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 with {size} elements")


def _check_int32(name: str, x: torch.Tensor, size: int) -> None:
    if x.dtype != torch.int32 or x.numel() != size or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 with {size} elements")


def _check_pools(
    k_pool: torch.Tensor, v_pool: torch.Tensor, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    want = (k_pool.shape[0], kv_heads, BLOCK_SIZE, head_dim)
    for pool in (k_pool, v_pool):
        if pool.shape != want or pool.dtype != dtype or not pool.is_contiguous():
            raise ValueError(f"pool is {pool.dtype} {tuple(pool.shape)}, must be {dtype} {want}")


def _raise(problem: int, message: str) -> None:
    if problem == 2:
        raise MemoryError("the native library could not allocate its scratch memory")
    if problem:
        raise ValueError(message)
