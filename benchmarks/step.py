"""Where a step of a model goes, by operation, and where its start goes, in the worker's own code.

    python benchmarks/step.py models/M-Q4_K_M/model.gguf --threads 2

Steps of 1, 8 and 16 decoding sequences with 160 tokens behind them, and prompts of 128 and 1,024.
Operations are timed by their calls, so what is left is Python, torch's small operations and the
sampler. The rate of the linear layers is beside what the machine reads in the same run.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import machine

_BEFORE = 160
"""Tokens that a decoding sequence has in its blocks."""
_OPERATIONS = {
    "grouped_linear": "linear layers",
    "linear": "linear layers",
    "paged_attention": "attention",
    "rotary_write_kv": "rotary, KV write",
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "act_and_mul": "activation",
}


class Clock:
    """Seconds by operation, of the calls through `ops`."""

    def __init__(self, ops: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        for name, title in _OPERATIONS.items():
            setattr(ops, name, self._timed(getattr(ops, name), title))

    def _timed(self, call: Callable[..., Any], title: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self.seconds[title] += time.perf_counter() - start
            return result

        return timed


class Sequences:
    """Makes plans: `count` sequences of `length` tokens each, in blocks of their own, with room for
    `steps` tokens more."""

    def __init__(self, runner: Any, count: int, length: int, steps: int = 32) -> None:
        from quantd.daemon import types

        self._types, self._runner = types, runner
        self.count, self._length = count, length
        self._room = -(-(length + steps) // types.BLOCK_TOKENS)

    def prefill(self) -> Any:
        sampling = self._types.SamplingParams(max_tokens=64, temperature=0.0)
        add, chunks = [], []
        span = min(7000, self._runner.info.vocab_size - 300)
        for seq in range(self.count):
            tokens = tuple(300 + (7 * i + seq) % span for i in range(self._length))
            add.append(self._types.NewSequence(seq, tokens, len(tokens), sampling))
            blocks = tuple(range(seq * self._room, (seq + 1) * self._room))
            chunks.append(self._types.Chunk(seq, 0, self._length, blocks, True))
        plan = self._types.StepPlan(0, tuple(chunks), add=tuple(add))
        return self._runner.execute(plan)

    def decode(self) -> Any:
        self._length += 1
        chunks = tuple(
            self._types.Chunk(seq, self._length - 1, self._length, (), True)
            for seq in range(self.count)
        )
        return self._runner.execute(self._types.StepPlan(0, chunks))

    def drop(self) -> None:
        self._runner.execute(self._types.StepPlan(0, (), drop=tuple(range(self.count))))


def timed_steps(clock: Clock, step: Callable[[], Any], repeats: int) -> list[dict[str, float]]:
    """Seconds by operation and in "all" of each step."""
    results = []
    for _ in range(repeats):
        clock.seconds.clear()
        whole = step().seconds
        results.append(clock.seconds | {"all": whole})
    return results


def show(title: str, steps: list[dict[str, float]], rows: int, sampled: int, model: Any) -> None:
    """One step, as medians. The output layer takes the `sampled` rows only."""
    names = dict.fromkeys(name for step in steps for name in step if name != "all")
    parts = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    whole = statistics.median(step["all"] for step in steps)
    parts["the rest"] = whole - sum(parts.values())
    cells = (f"{name} {1e3 * s:.1f} ({s / whole:.0%})" for name, s in parts.items())
    print(f"{title}: {1e3 * whole:.1f} ms = {rows / whole:.1f} tok/s;  {', '.join(cells)}")
    linear = parts["linear layers"]
    head = model.config.vocab_size * model.config.hidden_size
    products = (model.info.num_parameters - head) * rows + head * sampled
    read, rate = model.info.weight_bytes / linear / 1e9, 2 * products / linear / 1e9
    print(f"    linear layers: {read:.1f} GB/s of weights, {rate:.0f} GOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a folder or a GGUF file")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    from quantd.daemon.engine.process import worker_environment

    os.environ.update(worker_environment(os.environ))
    start = time.perf_counter()
    import torch  # noqa: F401

    torch_seconds = time.perf_counter() - start
    from quantd.daemon.types import LoadModel
    from quantd.daemon.worker.runner import Runner
    from quantd.kernels import ops

    imported = time.perf_counter() - start
    stages: dict[str, float] = {}

    def note(progress: Any) -> None:
        stages.setdefault(progress.stage, time.perf_counter() - start)

    load = LoadModel(
        "model",
        options.model,
        quantization=options.quantization,
        max_context=2048,
        threads=options.threads,
    )
    runner = Runner(load, note)
    loaded = time.perf_counter() - start
    print(f"import torch {torch_seconds:.2f} s, the rest of the worker by {imported:.2f} s")
    begun = ", ".join(f"{stage} from {seconds:.2f} s" for stage, seconds in stages.items())
    print(f"{begun}, loaded by {loaded:.2f} s: {runner.info.weight_bytes >> 20} MiB of weights")
    print(f"this machine reads {machine.read_bandwidth() or 0.0:.1f} GB/s")
    model, clock = runner._model, Clock(ops)
    for count in (1, 8, 16):
        sequences = Sequences(runner, count, _BEFORE)
        sequences.prefill()
        steps = timed_steps(clock, sequences.decode, options.repeats)
        show(f"{count} rows", steps, count, count, model)
        sequences.drop()
    for length in (128, 1024):
        steps = []
        for _ in range(max(2, options.repeats // 3)):
            sequences = Sequences(runner, 1, length)
            steps += timed_steps(clock, sequences.prefill, 1)
            sequences.drop()
        show(f"prefill {length}", steps, length, 1, model)


if __name__ == "__main__":
    main()
