"""LoadModel to an encoder that can run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from quantd.daemon.types import BLOCK_TOKENS, LoadModel, LoadProgress, ModelInfo
from quantd.daemon.worker.checkpoint import Checkpoint
from quantd.daemon.worker.dummy import DummySource
from quantd.daemon.worker.load import choose_device, choose_dtype
from quantd.daemon.worker.loader import Progress, choose, count_quantizers, load_weights
from quantd.daemon.worker.machine import physical_cores
from quantd.daemon.worker.models.encoder import Encoder
from quantd.daemon.worker.models.encoder_config import (
    EncoderConfig,
    encoder_tensors,
    read_encoder,
    refuse_labels,
)
from quantd.daemon.worker.models.names import dense_shapes
from quantd.daemon.worker.pooling import PoolingPlan
from quantd.kernels import ops
from quantd.plugins.api import Refused, TensorSource
from quantd.plugins.select import Registry, notes, parse_rules

_MAX_TOKENS = 1 << 16
"""Of the texts that are in the batch at once. An encoder keeps nothing: its blocks only count."""


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """Everything that a step needs."""

    encoder: Encoder
    config: EncoderConfig
    device: torch.device
    info: ModelInfo


def load_encoder(
    load: LoadModel, checkpoint: Checkpoint, plan: PoolingPlan, progress: Progress
) -> EncoderModel:
    """Raises Refused when loading again cannot help."""
    started = time.perf_counter()
    progress(LoadProgress("checking", 0, 0))
    config = read_encoder(checkpoint.config)
    if plan.task == "rerank":
        refuse_labels(config)
    pooling = plan.info(config.hidden_size)
    max_context = context_of(load.max_context, config, plan)
    device = choose_device(load.device)
    ops.set_num_threads(load.threads or physical_cores())
    exact = load.dtype == "float32"
    source: TensorSource
    if load.load_format == "dummy":
        dtype = choose_dtype(load.dtype, config.dtype or "float32", device)
        tensors = encoder_tensors(config, dtype, (), exact)
        source = DummySource(checkpoint.config, dense_shapes(tensors, config), dtype)
    else:
        source = checkpoint.source()
        dtype = choose_dtype(load.dtype, config.dtype or stored_dtype(source), device)
        tensors = encoder_tensors(config, dtype, source.names(), exact)
    registry = Registry()
    choices = choose(config, source, tensors, device, registry, parse_rules(load.quantization))
    weights = load_weights(config, source, tensors, choices, device, progress)
    info = ModelInfo(
        architecture=config.architecture,
        num_parameters=weights.num_parameters,
        weight_bytes=weights.nbytes,
        vocab_size=checkpoint.vocab_size(config.vocab_size),
        max_context=max_context,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        block_bytes=0,
        num_blocks=max(_MAX_TOKENS, 2 * max_context) // BLOCK_TOKENS,
        seconds=time.perf_counter() - started,
        quantizers=count_quantizers(choices.linears),
        notes=(
            *ops.notes(dtype, device),
            *registry.warnings,
            *notes(source, tensors.linears.values(), choices.linears),
            *plan.notes,
        ),
        pooling=pooling,
    )
    return EncoderModel(Encoder(config, weights, dtype), config, device, info)


def context_of(wanted: int | None, config: EncoderConfig, plan: PoolingPlan) -> int:
    """What the checkpoint says, unless the configuration does; never more than there are
    positions. Raises Refused."""
    limit = config.context_limit
    if wanted is None:
        return min(limit, plan.max_tokens or limit)
    if wanted > limit:
        raise Refused(f"max_context = {wanted}, but the checkpoint ends at {limit}")
    return wanted


def stored_dtype(source: TensorSource) -> str:
    """For a config.json that does not say."""
    norms = (source.dtype(name) for name in source.names() if ".LayerNorm." in name)
    return next(norms, "absent")
