"""LoadModel to a model that can run: the worker's composition root."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantd.daemon.types import BLOCK_TOKENS, LoadModel, LoadProgress, ModelInfo, Pooling
from quantd.daemon.worker.checkpoint import open_checkpoint
from quantd.daemon.worker.dummy import DummySource
from quantd.daemon.worker.gpu.bounce import bounce_bytes
from quantd.daemon.worker.gpu.budget import Costs, Step, fitting_blocks
from quantd.daemon.worker.gpu.sampler import try_sampling
from quantd.daemon.worker.loader import (
    Progress,
    Refused,
    Weights,
    choose,
    count_quantizers,
    load_weights,
)
from quantd.daemon.worker.machine import computes_bfloat16, physical_cores
from quantd.daemon.worker.memory import (
    KvPools,
    allocate,
    block_bytes,
    check_kv_bytes,
    num_blocks,
    num_host_blocks,
)
from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.models.decoder import Decoder
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.models.names import dense_shapes, model_tensors
from quantd.daemon.worker.pooling import PoolingPlan
from quantd.daemon.worker.revision import kv_revision
from quantd.daemon.worker.stacked import notes as expert_notes
from quantd.kernels import ops
from quantd.plugins.api import TensorSource
from quantd.plugins.select import Registry, notes, parse_rules

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Model:
    """Everything that a step needs."""

    decoder: Decoder
    config: ModelConfig
    weights: Weights
    pools: KvPools
    device: torch.device
    info: ModelInfo


def load_model(load: LoadModel, progress: Progress, pooling: PoolingPlan | None = None) -> Model:
    """With `pooling` there is no output layer. Raises Refused when loading again cannot help."""
    started = time.perf_counter()
    progress(LoadProgress("checking", 0, 0))
    checkpoint = open_checkpoint(Path(load.path))
    config = read_config(checkpoint.config)
    if checkpoint.norm_offset_baked:
        config = replace(config, norm_offset=0.0)
    device = choose_device(load.device)
    max_context = _max_context(load.max_context, config, pooling)
    ops.set_num_threads(load.threads or physical_cores())
    source: TensorSource
    if load.load_format == "dummy":
        dtype = choose_dtype(load.dtype, config.dtype or "bfloat16", device)
        tensors = model_tensors(config, dtype, (), load.dtype == "float32", pooling is None)
        shapes = dense_shapes(tensors, config)
        source = DummySource(checkpoint.config, shapes, dtype, norm=1.0 - config.norm_offset)
    else:
        source = checkpoint.source()
        dtype = choose_dtype(load.dtype, config.dtype or stored_dtype(source), device)
        exact = load.dtype == "float32"
        tensors = model_tensors(config, dtype, source.names(), exact, pooling is None)
    kv_dtype = choose_kv_dtype(load.kv_dtype, dtype, device)
    pooled = None if pooling is None else pooling.info(config.hidden_size)
    check_kv_bytes(load.kv_bytes, config, kv_dtype, device)
    host_blocks = num_host_blocks(load.host_kv_bytes, block_bytes(config, kv_dtype))
    registry = Registry()
    choices = choose(config, source, tensors, device, registry, parse_rules(load.quantization))
    vocab_size = checkpoint.vocab_size(config.vocab_size)
    weights = load_weights(config, source, tensors, choices, device, progress)
    decoder = Decoder(config, weights, dtype, max_context)
    if device.type == "cuda":
        progress(LoadProgress("compiling", 0, 0))
        if pooling is None:
            hidden = torch.zeros(1, config.hidden_size, dtype=dtype, device=device)
            try_sampling(decoder.logits(hidden), vocab_size)
        step = largest_step(load, max_context, pooled)
        is_packed = any(choice.quantizer.name != "dense" for choice in choices.linears)
        bounce = bounce_bytes(block_bytes(config, kv_dtype), host_blocks)
        costs = Costs(config, dtype, kv_dtype, is_packed, on_gpu=True, bounce=bounce)
        blocks, fitted = fitting_blocks(load.kv_bytes, costs, step, weights.nbytes, decoder, device)
    else:
        blocks, fitted = num_blocks(load.kv_bytes, block_bytes(config, kv_dtype), max_context), ()
    pools = allocate(config, kv_dtype, device, blocks)
    info = ModelInfo(
        architecture=config.architecture,
        num_parameters=weights.num_parameters,
        weight_bytes=weights.nbytes,
        vocab_size=vocab_size,
        max_context=max_context,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        block_bytes=pools.block_bytes,
        num_blocks=pools.num_blocks,
        max_blocks=pools.max_blocks,
        num_host_blocks=host_blocks,
        window=max((layer.window or 0 for layer in config.layers), default=0),
        window_share=pools.window_share,
        kv_revision=kv_revision(load, checkpoint.config, dtype, device, max_context),
        seconds=time.perf_counter() - started,
        quantizers=count_quantizers(choices.linears),
        notes=(
            *ops.notes(dtype, device),
            *expert_notes(tensors, weights.stacks, device),
            *registry.warnings,
            *notes(source, tensors.linears.values(), choices.linears),
            *fitted,
            *pools.notes,
            *_pool_notes(pools, max_context),
            *(() if pooling is None else pooling.notes),
        ),
        pooling=pooled,
    )
    return Model(decoder, config, weights, pools, device, info)


def largest_step(load: LoadModel, max_context: int, pooling: Pooling | None) -> Step:
    """That the scheduler may ask for."""
    tokens = load.token_budget
    if pooling is None:
        return Step(tokens, min(load.max_running, tokens), max_context)
    return Step(max(tokens, max_context) if pooling.whole else tokens, 0, max_context)


def choose_device(name: str) -> torch.device:
    """The device of this process's model, a GPU with its number. It becomes the current one, which
    is where Triton launches."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refused(f"device = {name!r}, must be auto, cpu or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise Refused(f"device = {name!r}, must be auto, cpu or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            raise Refused(f"device = {name!r}, but this machine has {count} CUDA devices")
        torch.cuda.set_device(device)
    return device


def _max_context(wanted: int | None, config: ModelConfig, pooling: PoolingPlan | None) -> int:
    if wanted is None:
        most = None if pooling is None else pooling.max_tokens
        return min(config.default_context, most or config.default_context)
    if wanted > config.context_limit:
        raise Refused(f"max_context = {wanted}, but the checkpoint ends at {config.context_limit}")
    return wanted


def choose_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """Of activations, weights that are not quantized, and the KV pools. "auto" is the checkpoint's
    own, but float32 for bfloat16 on a processor without such arithmetic."""
    name = checkpoint if wanted == "auto" else wanted
    if wanted == "auto" and name == "bfloat16" and device.type == "cpu" and not computes_bfloat16():
        name = "float32"
    if name not in _DTYPES:
        raise Refused(f"dtype is {name!r}, must be bfloat16, float16 or float32")
    return _DTYPES[name]


def choose_kv_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the pools, for activations of `dtype`."""
    if wanted == "auto":
        return dtype
    if wanted != "e4m3":
        raise Refused(f"kv_dtype is {wanted!r}, must be auto or e4m3")
    if device.type == "cpu":
        raise Refused(
            'kv_dtype is "e4m3", which the kernels for a CPU do not read: use "auto", or a GPU'
        )
    return torch.float8_e4m3fn


def stored_dtype(source: TensorSource) -> str:
    """For a config.json that does not say; norms are never quantized."""
    norms = (source.dtype(name) for name in source.names() if name.endswith("norm.weight"))
    return next(norms, "absent")


def _pool_notes(pools: KvPools, max_context: int) -> tuple[str, ...]:
    tokens = pools.num_blocks * BLOCK_TOKENS
    if tokens >= max_context:
        return ()
    more = ", but for what lies outside of sliding windows" if pools.window_share else ""
    return (f"the KV pool holds {tokens} tokens{more}, less than the context of {max_context}",)
