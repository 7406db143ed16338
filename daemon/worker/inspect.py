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
from quantd.daemon.types import BLOCK_TOKENS, LoadModel
from quantd.daemon.worker import child
from quantd.daemon.worker.checkpoint import Checkpoint, open_checkpoint
from quantd.daemon.worker.load import choose_device, choose_dtype, stored_dtype
from quantd.daemon.worker.load_encoder import context_of
from quantd.daemon.worker.load_encoder import stored_dtype as stored_encoder_dtype
from quantd.daemon.worker.loader import choose
from quantd.daemon.worker.memory import block_bytes
from quantd.daemon.worker.models.config import CheckpointConfig, ModelConfig
from quantd.daemon.worker.models.encoder_config import (
    EncoderConfig,
    encoder_tensors,
    read_encoder,
    refuse_labels,
)
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.models.names import ModelTensors, model_tensors
from quantd.daemon.worker.pooling import PoolingPlan, plan_pooling
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
    load = LoadModel("", request["path"])
    pooling = plan_pooling(load, checkpoint.path, checkpoint.config)
    config: ModelConfig | EncoderConfig
    if pooling is not None and pooling.is_encoder:
        config = read_encoder(checkpoint.config)
        report["model"] = _encoder(config, checkpoint, pooling)
        stored = config.dtype or stored_encoder_dtype(source)
    else:
        config = read_config(checkpoint.config)
        report["model"] = _model(config, checkpoint, pooling)
        stored = config.dtype or stored_dtype(source)
    device = choose_device(request["device"])
    wanted = request["dtype"]
    dtype = choose_dtype(wanted, stored, device)
    report |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    report["notes"] += ops.notes(dtype, device)
    names, exact = source.names(), wanted == "float32"
    if isinstance(config, EncoderConfig):
        tensors = encoder_tensors(config, dtype, names, exact)
    else:
        report["kv_bytes_per_token"] = block_bytes(config, dtype) // BLOCK_TOKENS
        tensors = model_tensors(config, dtype, names, exact, pooling is None)
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
    vectors += 4 * sum(table.rows * table.columns for table in tensors.tables.values())
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


def _encoder(config: EncoderConfig, checkpoint: Checkpoint, pooling: PoolingPlan) -> Report:
    if pooling.task == "rerank":
        refuse_labels(config)
    return {
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_heads,
        "head_dim": config.head_dim,
        "experts": None,
        "output_rows": config.vocab_size,
        "vocab_size": checkpoint.vocab_size(config.vocab_size),
        "context": context_of(None, config, pooling),
        "context_limit": config.context_limit,
        "pooling": _pooling(pooling, config.hidden_size),
    }


def _pooling(plan: PoolingPlan | None, size: int) -> Report | None:
    """What it gives instead of tokens; None: it generates."""
    if plan is None:
        return None
    info = plan.info(size)
    return {
        "task": info.task,
        "size": info.size,
        "kind": plan.kind if info.task == "embed" else "cls",
        "normalized": info.normalized,
        "matryoshka": info.matryoshka,
        "dimensions": list(info.dimensions),
    }


def _model(config: ModelConfig, checkpoint: Checkpoint, pooling: PoolingPlan | None) -> Report:
    most = None if pooling is None else pooling.max_tokens
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
        "context": min(config.default_context, most or config.default_context),
        "context_limit": config.context_limit,
        "pooling": _pooling(pooling, config.hidden_size),
    }


def _parameters(config: CheckpointConfig, tensors: ModelTensors) -> int:
    linears = sum(
        (spec.in_features + spec.bias) * spec.out_features for spec in tensors.linears.values()
    )
    is_counted = config.tied and "lm_head" in tensors.linears
    untied = 0 if is_counted else config.vocab_size * config.hidden_size
    untied += sum(table.rows * table.columns for table in tensors.tables.values())
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
