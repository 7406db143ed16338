"""What a checkpoint is and how it would be run, from its headers: the torch half of `inspect`.

`python -m quantd.daemon.worker.inspect`, by the protocol of `child.py`. The request has path,
dtype, quantization and device, as in LoadModel. A checkpoint that is refused gets a report too: all
that could be found, and `refused`, the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantd.daemon.gguf.types import BLOCKS
from quantd.daemon.types import BLOCK_TOKENS
from quantd.daemon.worker import child
from quantd.daemon.worker.checkpoint import Checkpoint, open_checkpoint
from quantd.daemon.worker.load import choose_device, choose_dtype, stored_dtype
from quantd.daemon.worker.loader import choose
from quantd.daemon.worker.memory import block_bytes
from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.models.names import ModelTensors, model_tensors
from quantd.kernels import ops
from quantd.plugins.api import Describes, FromPlain, LinearSpec, Refused, TensorSource
from quantd.plugins.select import Choice, Registry, Rule, notes, parse_rules, select

_BYTES = {**BLOCKS, "F8_E4M3": (1, 1), "F8_E5M2": (1, 1), "U8": (1, 1), "BOOL": (1, 1)}
"""Type → (elements, bytes of so many)."""

Report = dict[str, Any]


def inspect(request: dict[str, Any], send: child.Send) -> Report:
    """`refused` is None for a checkpoint that would be loaded."""
    registry = Registry()
    report: Report = {"path": request["path"], "refused": None, "notes": []}
    try:
        _report(report, request, registry)
    except Refused as error:
        report["refused"] = str(error)
    return report


def _report(report: Report, request: dict[str, Any], registry: Registry) -> None:
    """Adds what there is to say, from what is sure to what is asked for; each line below may raise
    Refused."""
    checkpoint = open_checkpoint(Path(request["path"]))
    report["said"] = _said(checkpoint)
    source = checkpoint.source()
    report["stored"] = _stored(source)
    config = read_config(checkpoint.config)
    report["model"] = _model(config, checkpoint)
    device = choose_device(request["device"])
    wanted = request["dtype"]
    dtype = choose_dtype(wanted, config.dtype or stored_dtype(source), device)
    report |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    report["notes"] += ops.notes(dtype)
    per_token = block_bytes(config, dtype) // BLOCK_TOKENS
    report["kv_bytes_per_token"] = per_token
    tensors = model_tensors(config, dtype, source.names(), exact=wanted == "float32")
    report["model"]["parameters"] = _parameters(config, tensors)
    rules = parse_rules(request["quantization"])
    report["layers"] = [
        _layer(spec, source, device, registry, rules) for spec in tensors.linears.values()
    ]
    choices = choose(config, source, tensors, device, registry, rules)
    report["notes"] += notes(source, tensors.linears.values(), choices.linears)
    report["embedding"] = _embedding(tensors, source, device, choices.embedding)
    linears = [layer["loaded_bytes"] for layer in report["layers"]]
    vectors = 4 * sum(vector.size for vector in tensors.vectors.values())
    report["weight_bytes"] = sum(linears) + vectors + report["embedding"]["loaded_bytes"]
    report["weight_bytes_exact"] = all(layer["described"] for layer in report["layers"])


def _said(checkpoint: Checkpoint) -> Report:
    """What config.json says, which may be nothing that is known here."""
    config = checkpoint.config
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return {
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "quant_method": method,
    }


def _stored(source: TensorSource) -> Report:
    """Of the file or files."""
    names = source.names()
    types = Counter(source.dtype(name) for name in names)
    return {
        "tensors": len(names),
        "bytes": sum(_stored_bytes(source, name) for name in names),
        "types": dict(types.most_common()),
    }


def _stored_bytes(source: TensorSource, name: str) -> int:
    elements, nbytes = _BYTES[source.dtype(name)]
    return math.prod(source.shape(name)) // elements * nbytes


def _model(config: ModelConfig, checkpoint: Checkpoint) -> Report:
    return {
        "architecture": config.architecture,
        "layers": len(config.layers),
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "experts": None if config.moe is None else config.moe.num_experts,
        "output_rows": config.vocab_size,
        "vocab_size": checkpoint.vocab_size(config.vocab_size),
        "context": config.default_context,
        "context_limit": config.context_limit,
    }


def _parameters(config: ModelConfig, tensors: ModelTensors) -> int:
    linears = sum(
        (spec.in_features + spec.bias) * spec.out_features for spec in tensors.linears.values()
    )
    untied = 0 if config.tied else config.vocab_size * config.hidden_size
    return linears + untied + sum(vector.size for vector in tensors.vectors.values())


def _layer(
    spec: LinearSpec,
    source: TensorSource,
    device: torch.device,
    registry: Registry,
    rules: Sequence[Rule],
) -> Report:
    """One linear layer; `quantizer` is None and `reason` says why when nobody takes it."""
    layer: Report = {
        "name": spec.name,
        "shape": [spec.out_features, spec.in_features],
        "quantizer": None,
        "format": None,
        "route": None,
        "stored_bytes": 0,
        "weights": spec.in_features * spec.out_features,
        "loaded_bytes": 0,
        "described": False,
        "others": (),
    }
    try:
        choice = select(spec, source, device, registry, rules)
        found = _format(spec, source, device, choice)
    except Refused as error:
        return layer | {"reason": str(error)}
    taken = {"quantizer": choice.quantizer.name, "reason": choice.reason}
    return layer | taken | {"others": choice.refusals} | found


def _format(spec: LinearSpec, source: TensorSource, device: torch.device, choice: Choice) -> Report:
    """By the quantizer's own description, else from what its tensors take in the file."""
    names = [name for name in choice.quantizer.tensors(spec, source) if name in source.names()]
    stored = sum(_stored_bytes(source, name) for name in names)
    out: Report = {"stored_bytes": stored}
    complete = len(names) == len(choice.quantizer.tensors(spec, source))
    if complete and isinstance(choice.quantizer, Describes):
        about = choice.quantizer.describe(spec, source, device)
        return out | {
            "format": about.text,
            "route": about.route,
            "loaded_bytes": about.nbytes,
            "described": True,
        }
    types = "/".join(sorted({source.dtype(name) for name in names}))
    made = "made from " if isinstance(choice.quantizer, FromPlain) else ""
    return out | {"format": f"{made}{types}", "loaded_bytes": stored}


def _embedding(
    tensors: ModelTensors, source: TensorSource, device: torch.device, choice: Choice
) -> Report:
    """The table of embeddings, which on a CPU stays in the mapped file."""
    name = tensors.embedding
    stored = _stored_bytes(source, name)
    return {
        "name": name,
        "type": source.dtype(name),
        "quantizer": choice.quantizer.name,
        "stored_bytes": stored,
        "loaded_bytes": 0 if device.type == "cpu" else stored,
    }


if __name__ == "__main__":
    child.main(inspect)
