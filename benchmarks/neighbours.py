"""Decode steps beside busy neighbours that are pinned to one core, in the worker's own code.

    python benchmarks/neighbours.py                        # the embedded demo model
    python benchmarks/neighbours.py M --quantization int4  # random weights of a shape of shapes.py

Windows without and with neighbours take turns; a figure is the mean of all steps of its windows,
because what a neighbour costs is a few steps that take very long. The neighbours sit on the last
core that this process may use. `others` is how many cores all other processes had meanwhile: above
0.1 or so it was no quiet machine and the figures are of no use.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shapes
from step import Sequences

_SPIN = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"
_BEFORE = 160
_MOST_STEPS = 1500
"""Of one window: what fits the context."""


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute without end on one core; stopped, until SIGCONT lets them."""
    core = max(os.sched_getaffinity(0))
    found = [subprocess.Popen([sys.executable, "-c", _SPIN % core]) for _ in range(count)]
    try:
        time.sleep(0.3)  # until they are pinned
        for process in found:
            process.send_signal(signal.SIGSTOP)
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


class Others:
    """CPU seconds of the machine that are neither this process's nor the neighbours'."""

    def __init__(self, busy: list[subprocess.Popen[bytes]]) -> None:
        self._pids = [os.getpid(), *(process.pid for process in busy)]
        self._start, self._used = time.perf_counter(), self._seconds()

    def _seconds(self) -> float:
        busy, *_ = Path("/proc/stat").read_text().splitlines()
        user, nice, system, _, _, irq, softirq = map(int, busy.split()[1:8])
        ours = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        return (user + nice + system + irq + softirq - ours) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float:
        """Since this was made, as a mean."""
        return (self._seconds() - self._used) / (time.perf_counter() - self._start)


def window(runner: Any, streams: int, seconds: float) -> list[float]:
    """Seconds of each step."""
    sequences = Sequences(runner, streams, _BEFORE, steps=_MOST_STEPS)
    sequences.prefill()
    sequences.decode()
    end, times = time.perf_counter() + seconds, []
    while time.perf_counter() < end and len(times) < _MOST_STEPS - 1:
        times.append(sequences.decode().seconds)
    sequences.drop()
    return times


def compare(
    runner: Any, streams: int, busy: list[subprocess.Popen[bytes]], options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of a step alone and beside the neighbours."""
    alone: list[float] = []
    beside: list[float] = []
    window(runner, streams, 0.2)
    others = Others(busy)
    for _ in range(options.rounds):
        alone += window(runner, streams, options.seconds)
        for process in busy:
            process.send_signal(signal.SIGCONT)
        beside += window(runner, streams, options.seconds)
        for process in busy:
            process.send_signal(signal.SIGSTOP)
    mean, slow = sum(alone) / len(alone), sum(beside) / len(beside)
    return {
        "streams": streams,
        "alone_ms": round(1e3 * mean, 3),
        "beside_ms": round(1e3 * slow, 3),
        "ratio": round(slow / mean, 2),
        "longest_beside_ms": round(1e3 * max(beside), 1),
        "others": round(others.cores(), 2),
    }


def open_runner(options: argparse.Namespace, folder: Path) -> Any:
    from quantd.daemon import embedded
    from quantd.daemon.engine.process import worker_environment
    from quantd.daemon.types import LoadModel

    os.environ.update(worker_environment(os.environ))  # before torch reads it
    from quantd.daemon.worker.runner import Runner

    path, load_format = options.model, "auto"
    if options.model in shapes.SHAPES:
        shapes.write_config(options.model, folder)
        path, load_format = str(folder), "dummy"
    elif options.model == "demo":
        path = str(embedded.path("demo"))
    load = LoadModel(
        "model",
        path,
        dtype=options.dtype,
        quantization=options.quantization,
        max_context=2048,
        load_format=load_format,
        threads=options.threads,
    )
    return Runner(load, lambda progress: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="demo", help="demo, a shape, a folder, a file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, neighbours(options.neighbours) as busy:
        runner = open_runner(options, Path(folder))
        for streams in options.streams:
            print(json.dumps(compare(runner, streams, busy, options)), flush=True)


if __name__ == "__main__":
    main()
