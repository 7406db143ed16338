"""The specifications: each operation in plain torch, on any device, correct before fast."""

from quantd.kernels.reference.activation import Activation, act_and_mul
from quantd.kernels.reference.attention import paged_attention
from quantd.kernels.reference.cache import (
    copy_blocks,
    gather_blocks,
    rotary_write_kv,
    scatter_blocks,
    write_kv,
)
from quantd.kernels.reference.encoder import activate, encoder_attention, layer_norm
from quantd.kernels.reference.experts import expert_feed_forward
from quantd.kernels.reference.grouped import dequantize_grouped, quantize_rows
from quantd.kernels.reference.linear import linear
from quantd.kernels.reference.logprobs import token_logprobs
from quantd.kernels.reference.norm import add_rms_norm, rms_norm
from quantd.kernels.reference.rotary import rotary
from quantd.kernels.reference.routing import route_experts
from quantd.kernels.reference.sample import sample_rows

__all__ = [
    "Activation",
    "act_and_mul",
    "activate",
    "add_rms_norm",
    "copy_blocks",
    "gather_blocks",
    "scatter_blocks",
    "dequantize_grouped",
    "encoder_attention",
    "expert_feed_forward",
    "layer_norm",
    "linear",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "route_experts",
    "sample_rows",
    "token_logprobs",
    "write_kv",
]
