"""A whole model with made-up weights in the worker's own runner, for `gpu.py`: without HTTP and
scheduler.

Steps are plans, as the scheduler makes them. The keys and values behind a decode are random
numbers: what they are has no say in how long it takes.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Rates

from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
)

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
BEHIND = 512
"""Tokens that a decoding sequence has in its blocks."""
_WARM, _STEPS = 8, 24
"""Decode steps before the clock, in which graphs are recorded, and under it."""


@dataclass(frozen=True)
class Format:
    quantization: dict[str, Any] | None = None
    """Of config.json."""
    rule: str = "auto"


def formats(layers: int) -> dict[str, Format]:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return {
        "bf16": Format(),
        "GPTQ, 4 bits": Format(gptq),
        "Q4_K_M": Format({"quant_method": "gguf", "types": q4_k_m(layers)}),
        "int8": Format(rule="int8"),
        "w8a8": Format(rule="w8a8"),
    }


def q4_k_m(layers: int) -> dict[str, str]:
    """llama.cpp's mix: values and down projections of about half of the layers, and the output
    layer, in six bits."""
    types = {"lm_head.weight": "Q6_K"}
    for i in range(layers):
        if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2:
            types[f"model.layers.{i}.self_attn.v_proj.weight"] = "Q6_K"
            types[f"model.layers.{i}.mlp.down_proj.weight"] = "Q6_K"
    return types | {"model.layers.*": "Q4_K"}


@dataclass
class Plan:
    """What to run of a model."""

    config: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_8B))
    streams: tuple[int, ...] = (1, 8, 64, 256)
    prompts: tuple[tuple[int, int], ...] = ((1, 2048), (1, 8192), (8, 1024))
    """(how many, tokens of each)"""
    behind: int = BEHIND
    warm: int = _WARM
    steps: int = _STEPS


def tiny_plan() -> Plan:
    return Plan(dict(TINY), (1, 3), ((1, 40), (2, 20)), 33, warm=2, steps=3)


class Loaded:
    """One model and its runner. `close` gives its memory back."""

    def __init__(self, format: Format, plan: Plan, device: torch.device) -> None:
        self.device, self._plan = device, plan
        self._is_gpu = device.type == "cuda"
        config = dict(plan.config)
        if format.quantization is not None:
            config["quantization_config"] = format.quantization
        most = max(*plan.streams, *(count for count, _ in plan.prompts))
        longest = plan.behind + plan.warm + 3 * plan.steps + 1
        blocks = most * -(-longest // BLOCK_TOKENS)
        blocks = max(blocks, *(n * -(-(size + 1) // BLOCK_TOKENS) for n, size in plan.prompts))
        head = config["hidden_size"] // config["num_attention_heads"]
        per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            load = LoadModel(
                "model",
                folder,
                dtype="bfloat16",
                quantization=format.rule,
                load_format="dummy",
                device="cpu" if device.type == "cpu" else "cuda:0",
                kv_bytes=blocks * BLOCK_TOKENS * per_token,
            )
            start = time.perf_counter()
            self.runner = _open(load)
            self.load_seconds = time.perf_counter() - start
        self.info = self.runner.info
        self._fill()

    def _fill(self) -> None:
        """Every block gets keys and values."""
        pools = self.runner._model.pools
        pools.ensure(pools.num_blocks)
        for tensor in (*pools.keys, *pools.values):
            tensor[: pools.num_blocks].normal_()

    def run(self, plans: Iterable[StepPlan]) -> list[float]:
        """Seconds between the results of `plans`, each of which is put before the result of the one
        before it, as the engine does; the first one's from its beginning."""
        ends = [time.perf_counter()]

        def note(result: StepResult) -> None:
            ends.append(time.perf_counter())
            errors = [item.error for item in result.sampled if item.error]
            assert not errors, errors[0]

        for plan in plans:
            self.runner.submit(plan, note)
        while self.runner.is_under_way:
            self.runner.poll(note)
        return [stop - start for start, stop in zip(ends, ends[1:], strict=False)]

    def close(self) -> None:
        self.runner = None
        gc.collect()
        if self._is_gpu:
            torch.cuda.empty_cache()


def _open(load: LoadModel) -> Any:
    from quantd.daemon.worker.pooled_runner import open_runner

    return open_runner(load, lambda progress: None)


class Sequences:
    """Plans of `count` sequences of `length` tokens each, in blocks of their own."""

    def __init__(self, count: int, length: int, room: int, vocabulary: int) -> None:
        self.seqs = range(count)
        self._length = length
        self._blocks = -(-(length + room) // BLOCK_TOKENS)
        self._vocabulary = vocabulary

    def _blocks_of(self, seq: int) -> tuple[int, ...]:
        return tuple(range(seq * self._blocks, (seq + 1) * self._blocks))

    def _new(self) -> tuple[NewSequence, ...]:
        sampling = SamplingParams(max_tokens=1 << 20, temperature=0.0)
        made = []
        for seq in self.seqs:
            tokens = tuple((7 * i + seq) % self._vocabulary for i in range(self._length))
            made.append(NewSequence(seq, tokens, self._length, sampling))
        return tuple(made)

    def prefill(self) -> StepPlan:
        """All prompts whole, in one step."""
        chunks = [Chunk(s, 0, self._length, self._blocks_of(s), True) for s in self.seqs]
        return StepPlan(0, tuple(chunks), add=self._new())

    def join(self) -> StepPlan:
        """As a prompt of which all but the last token is known already."""
        last = self._length - 1
        chunks = [Chunk(s, last, last + 1, self._blocks_of(s), True) for s in self.seqs]
        return StepPlan(0, tuple(chunks), add=self._new())

    def decode(self) -> StepPlan:
        self._length += 1
        chunks = [Chunk(s, self._length - 1, self._length, (), True) for s in self.seqs]
        return StepPlan(0, tuple(chunks))

    def drop(self) -> StepPlan:
        return StepPlan(0, (), drop=tuple(self.seqs))


def measure_model(
    name: str, format: Format, plan: Plan, device: torch.device, rates: Rates
) -> dict[str, Any]:
    """Decodes by number of streams, prompts, memory. Whatever fails is in it, and nothing ends."""
    row: dict[str, Any] = {"name": name, "decode": [], "prefill": []}
    try:
        before = _used(device)
        loaded = Loaded(format, plan, device)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    info = loaded.info
    row |= {
        "load_seconds": loaded.load_seconds,
        "weight_bytes": info.weight_bytes,
        "kv_bytes": info.num_blocks * info.block_bytes,
        "quantizers": dict(info.quantizers),
        "notes": list(info.notes),
    }
    tasks: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for count in plan.streams:
        tasks.append(("decode", f"{count}", partial(decode, loaded, plan, count, rates)))
    for count, length in plan.prompts:
        tasks.append(
            ("prefill", f"{count} x {length}", partial(prefill, loaded, count, length, plan.config))
        )
    for kind, title, task in tasks:
        try:
            row[kind].append({"name": title} | task())
        except Exception as error:
            row[kind].append({"name": title, "error": f"{type(error).__name__}: {error}"})
            break  # after a failed plan the runner is no longer what the plans say
    row["used_bytes"] = _used(device) - before
    loaded.close()
    return row


def _used(device: torch.device) -> int:
    """Of the device's memory, by whomever."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def decode(loaded: Loaded, plan: Plan, count: int, rates: Rates) -> dict[str, Any]:
    room = plan.warm + 3 * plan.steps + 1
    sequences = Sequences(count, plan.behind, room, plan.config["vocab_size"])
    loaded.run([sequences.join(), *(sequences.decode() for _ in range(plan.warm))])
    seconds = loaded.run([sequences.decode() for _ in range(plan.steps)])
    busy = device_busy(loaded, [sequences.decode() for _ in range(plan.steps)])
    loaded.run([sequences.drop()])
    step = statistics.median(seconds)
    # Of the table of embeddings only a few rows are read.
    config, info = plan.config, loaded.info
    table = config["vocab_size"] * config["hidden_size"] * 2
    weights = info.weight_bytes - (table if loaded.device.type == "cuda" else 0)
    keys = count * (plan.behind + plan.warm) * info.block_bytes / BLOCK_TOKENS
    return {
        "streams": count,
        "step_ms": step * 1e3,
        "slowest_ms": max(seconds) * 1e3,
        "tokens_per_second": count / step,
        "device_ms": busy * 1e3,
        "gap_ms": max(0.0, step - busy) * 1e3,
        "least_bytes": weights + keys,
        "fraction": (weights + keys) / rates["copy"] / step,
    }


def prefill(loaded: Loaded, count: int, length: int, config: dict[str, Any]) -> dict[str, Any]:
    seconds = []
    for _ in range(3):
        sequences = Sequences(count, length, 1, config["vocab_size"])
        seconds += loaded.run([sequences.prefill()])
        loaded.run([sequences.drop()])
    took = min(seconds)  # the first one compiles
    return {"seconds": took, "tokens_per_second": count * length / took}


def device_busy(loaded: Loaded, plans: list[StepPlan]) -> float:
    """Seconds of a step in which the device runs something: the union of its kernels and copies as
    the profiler has them. What is left of a step is the gap in which it waits for the host."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_gpu = loaded.device.type == "cuda"
    kind = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with profile(activities=[kind], acc_events=True) as found:
        loaded.run(plans)
        if is_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if is_gpu else DeviceType.CPU
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == wanted and not event.is_user_annotation
    )
    return union(spans) / 1e6 / len(plans)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line these pieces of it cover; they are in order of their start."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
