"""e4m3 (OCP 8-bit floating point: bias 7, no infinities, NaN 0x7F) by integer operations.

Not Triton's own conversion, which GPUs before compute capability 8.9 lack: these give the same
bits on all of them, and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)

WIDENED_BY = tl.constexpr(0.00390625)
"""`widen` gives the value times this, 2**-8: the exponent's bias is left as it is."""


@triton.jit
def widen(bits):
    """uint8 -> float16, the value times WIDENED_BY; exact, NaN stays NaN."""
    word = bits.to(tl.uint16)
    magnitude = (word & 0x7F) << 7
    # 0x7F would become 1.875.
    magnitude = tl.where(magnitude == 0x3F80, 0x7E00, magnitude).to(tl.uint16)
    return (((word & 0x80) << 8) | magnitude).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def narrow(value):
    """fp32 -> uint8, rounded half to even; what is beyond the largest value becomes it."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    size = magnitude.to(tl.float32, bitcast=True)
    capped = tl.minimum(size, LARGEST)
    # Below 2**-6 a unit is 2**-9, which is that of 2**14 in fp32.
    small = (capped + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    word = capped.to(tl.uint32, bitcast=True)
    rounded = (word + 0x7FFFF + ((word >> 20) & 1)) >> 20
    code = tl.where(capped < 0.015625, small, rounded - (120 << 3))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)
