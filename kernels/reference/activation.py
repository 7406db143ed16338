"""The gated activations of the feed-forward layers in plain torch: the specification."""

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh", "gelu"]


def act_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up, with gate_up [T, 2I] holding gate first and up second -> [T, I].

    Computed in fp32 (fp64 for fp64 input) and rounded once.
    """
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    if activation == "silu":
        gate = F.silu(gate)
    elif activation == "gelu_tanh":
        gate = F.gelu(gate, approximate="tanh")
    elif activation == "gelu":
        gate = F.gelu(gate)
    else:
        raise ValueError(f"activation is {activation!r}, must be silu, gelu_tanh or gelu")
    return (gate * up).to(gate_up.dtype)
