"""What planning ahead is worth: how long a worker waits between two steps, with and without.

    python benchmarks/overlap.py models/T --streams 1,16 --output 128 --json results.json

The same daemon with `scheduler.overlap` on and off, in turns. The gap of a step is what of the wall
time, while all streams decode, no step was running (`quantd_step_seconds_total`), over the steps.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import Any

import load
import machine
import peers


def counters(url: str) -> tuple[float, float]:
    """(steps, seconds in steps) since the start."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()

    def value(name: str) -> float:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in /metrics"
        return float(found[1])

    return value("quantd_steps_total"), value("quantd_step_seconds_total")


def gap(peer: peers.Peer, scenario: load.Scenario, repeats: int) -> dict[str, float]:
    """Milliseconds of a step and of the wait before it, medians over the repeats."""
    steps, gaps, rates = [], [], []
    with peers.RunningPeer(peer) as server:
        for repeat in range(repeats + 1):
            before = counters(server.url)
            measured = asyncio.run(load.run(server.url, "model", scenario, repeat))
            count, seconds = (b - a for a, b in zip(before, counters(server.url), strict=True))
            if repeat:  # the first one warms up
                steps.append(1e3 * seconds / count)
                gaps.append(1e3 * (measured.wall - seconds) / count)
                rates.append(measured.output_rate)
    figures = {"step_ms": steps, "gap_ms": gaps, "tokens_per_s": rates}
    return {name: statistics.median(values) for name, values in figures.items()}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("model", help="a folder or a GGUF file")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--output", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    address = ("--host", "127.0.0.1", "--port", "{port}")
    command = (sys.executable, "-m", "quantd.daemon", "serve", f"model={options.model}", *address)
    command += ("--threads", str(options.threads))
    results: list[dict[str, Any]] = []
    for streams in map(int, options.streams.split(",")):
        scenario = load.Scenario("decode", streams=streams, prompt=16, output=options.output)
        for overlap in ("true", "false"):
            peer = peers.Peer("quantd", f"overlap {overlap}", (*command, "--overlap", overlap))
            result = {"streams": streams, "overlap": overlap == "true"}
            result |= gap(peer, scenario, options.repeats)
            results.append(result)
            print(
                f"{streams:3d} streams, overlap {overlap:5}: step {result['step_ms']:.2f} ms,"
                f" gap {result['gap_ms']:.2f} ms, {result['tokens_per_s']:.0f} tok/s",
                flush=True,
            )
    if options.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.describe(),
            "command": " ".join(["python", "benchmarks/overlap.py", *sys.argv[1:]]),
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
