"""A Llama decoder for training, its parameters named as in transformers, and its export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MAX_POSITIONS, ROPE_THETA, NORM_EPS = 8192, 10000.0, 1e-5


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 1024


# Multiples of 256 where they can be, so that every blockwise quantization format fits.
SHAPES = {
    "base": Shape(hidden=256, layers=8, heads=8, kv_heads=4, head_dim=32, intermediate=768),
    "draft": Shape(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate=384),
}
FOLDERS = {"base": "demo", "draft": "demo-draft"}


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


def _linear(inputs: int, outputs: int, zero: bool = False) -> nn.Linear:
    """Zero for projections back into the residual stream: every layer starts as the identity."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.0 if zero else inputs**-0.5)
    return linear


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.head_dim
        self.q_proj = _linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = _linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = _linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = _linear(s.heads * s.head_dim, s.hidden, zero=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.head_dim).transpose(1, 2)

        q, k = (_rotate(split(p(x)), cos, sin) for p in (self.q_proj, self.k_proj))
        repeat = self.heads // self.kv_heads
        k = k.repeat_interleave(repeat, dim=1)
        v = split(self.v_proj(x)).repeat_interleave(repeat, dim=1)
        # Spelt out: on a CPU, and for short rows, twice as fast as scaled_dot_product_attention.
        scores = (q * self.head_dim**-0.5) @ k.mT
        future = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
        y = (scores + future).softmax(dim=-1).to(v.dtype) @ v
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs (i, i + d/2)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = _linear(s.hidden, s.intermediate)
        self.up_proj = _linear(s.hidden, s.intermediate)
        self.down_proj = _linear(s.intermediate, s.hidden, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Token ids [batch, length] int64 → logits; the head is the embedding, transposed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)

    def forward(self, ids: Tensor, where: Tensor) -> Tensor:
        """Logits [n, vocab] at the n places where `where` [batch, length] bool is true."""
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angles = torch.outer(torch.arange(ids.shape[1]), ROPE_THETA**-half)
        cos, sin = (torch.cat((f(angles),) * 2, dim=-1) for f in (torch.cos, torch.sin))
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x[where]), self.embed_tokens.weight)


def config(shape: Shape, eos: int, pad: int) -> dict[str, object]:
    """config.json in transformers' Llama format."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def save(shape: Shape, weights: Mapping[str, Tensor], folder: Path, eos: int, pad: int) -> None:
    """Write model.safetensors (bfloat16), config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().to(torch.bfloat16).contiguous()
        for name, value in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
    for name, content in (
        ("config.json", config(shape, eos, pad)),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> Llama:
    """The exported model of a folder, computed in float32."""
    stored = json.loads((folder / "config.json").read_text())
    shape = next(s for s in SHAPES.values() if s.hidden == stored["hidden_size"])
    model = Llama(shape)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in tensors.items()})
    return model.eval()
