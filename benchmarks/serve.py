"""quantd and every peer that is installed, on the same weights, in one run.

    python benchmarks/shapes.py M models/M --gguf
    python benchmarks/serve.py models/M --llama-server PATH --json results/serve.json

The servers take turns (A B A B …), one up at a time, because a shared machine drifts; each round
also measures the machine itself. Printed: medians over the rounds, and quantd's ratio to each peer.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import load
import machine
import peers

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        load.Scenario("one", streams=1, prompt=128, output=128),
        load.Scenario("prefill", streams=1, prompt=1024, output=2),
        load.Scenario("8", streams=8, prompt=128, output=64),
        load.Scenario("16", streams=16, prompt=128, output=64),
        load.Scenario("shared", streams=16, prompt=32, output=16, shared=512),
        load.Scenario("primed", streams=16, prompt=32, output=16, shared=512, primed=True),
    )
}
_FIGURES = {"one": "decode_rate", "prefill": "prefill_rate", "shared": "wall", "primed": "wall"}
WARM_UP = load.Scenario("warm", streams=1, prompt=16, output=4)


def measure(peer: peers.Peer, names: list[str], repeat: int) -> dict[str, Any]:
    """One round of one server: start time, peak memory, and each scenario once."""
    with peers.RunningPeer(peer) as server:
        asyncio.run(load.run(server.url, "model", WARM_UP, repeat))
        result: dict[str, Any] = {"start": server.start_seconds}
        for name in names:
            measured = asyncio.run(load.run(server.url, "model", SCENARIOS[name], repeat))
            result[name] = asdict(measured)
            print(
                f"  {peer.name:10} {name:8} {measured.output_rate:7.1f} tok/s out"
                f"  decode {measured.decode_rate:6.1f}  prefill {measured.prefill_rate:6.1f}"
                f"  TTFT {measured.ttft_mean:7.0f} ms  ITL p50 {measured.itl_p50:6.1f}"
                f" p99 {measured.itl_p99:6.1f} ms",
                flush=True,
            )
        result["peak_mib"] = server.peak_mebibytes()
    print(
        f"  {peer.name:10} start {result['start']:.1f} s, peak {result['peak_mib']} MiB", flush=True
    )
    return result


def _figure(rounds: list[dict[str, Any]], name: str) -> float:
    """The figure that a scenario is judged by, as the median over the rounds."""
    if name in ("start", "peak_mib"):
        return statistics.median(r[name] for r in rounds)
    key = {"one": "decode_rate", "prefill": "prefill_rate", "shared": "wall", "primed": "wall"}.get(
        name
    )
    return statistics.median(r[name][key or "output_rate"] for r in rounds)


def table(results: dict[str, list[dict[str, Any]]], names: list[str]) -> str:
    """A Markdown table: a row a figure, a column a server, quantd's ratio to each peer."""
    titles = {
        "one": "one stream, decode tok/s",
        "prefill": "prefill of 1,024, tok/s",
        "8": "8 streams, tok/s",
        "16": "16 streams, tok/s",
        "shared": "16 × (512 shared + 32), s",
        "primed": "the same, prefix sent before, s",
        "start": "start to first token, s",
        "peak_mib": "peak memory, MiB",
    }
    others = [name for name in results if name != "quantd"]
    head = ["", "quantd", *others, *(f"quantd / {name}" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in [*names, "start", "peak_mib"]:
        ours = _figure(results["quantd"], name)
        theirs = [_figure(results[other], name) for other in others]
        cells = [f"{ours:.1f}", *(f"{value:.1f}" for value in theirs)]
        cells += [f"{ours / value:.2f}" for value in theirs]
        lines.append(f"| {titles[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder made by shapes.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenarios", default="one,prefill,8,16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llama-server", help="path of llama.cpp's server")
    parser.add_argument("--llama-model", type=Path, help="its weights (default: MODEL/model.gguf)")
    parser.add_argument("--quantization", default="auto", help="what quantd makes of the weights")
    parser.add_argument("--only", help="comma-separated names of servers")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    arguments = parser.parse_args()
    names = arguments.scenarios.split(",")
    chosen = peers.available(
        arguments.model,
        arguments.threads,
        arguments.llama_server,
        arguments.quantization,
        arguments.llama_model or arguments.model / "model.gguf",
    )
    if arguments.only:
        chosen = [peer for peer in chosen if peer.name in arguments.only.split(",")]
    results: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in chosen}
    bandwidth: list[float | None] = []
    print(machine.describe())
    for repeat in range(arguments.rounds):
        bandwidth.append(machine.read_bandwidth())
        rate = f"{bandwidth[-1]:.1f} GB/s" if bandwidth[-1] else "unknown (no C compiler)"
        print(f"round {repeat + 1}: this machine reads {rate}", flush=True)
        for peer in chosen:
            results[peer.name].append(measure(peer, names, repeat))
    if "quantd" in results:
        print(table(results, names))
    if arguments.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.describe(),
            "read_gb_per_s": bandwidth,
            "commands": {peer.name: list(peer.command) for peer in chosen},
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
