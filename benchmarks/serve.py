"""Servers side by side through HTTP, in one run: quantd in any format, and its peers.

    python benchmarks/serve.py quantd:models/M-Q4_K_M llama.cpp:models/M-Q4_K_M \
        quantd:models/M:int8 openvino:models/M-ov-int8 \
        --llama-server PATH --openvino-python VENV/bin/python --json results.json

A server is ENGINE:PATH, for quantd also ENGINE:PATH:QUANTIZATION; engines are quantd, llama.cpp,
openvino and vllm. The servers take turns (A B A B …), one up at a time, because a shared machine
drifts; each round also measures the machine itself. Printed: medians over the rounds, and the ratio
of each quantd to each server named after it. A --json file that is there gets the rounds added.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import shutil
import statistics
from dataclasses import asdict
from itertools import combinations
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
WARM_UP = load.Scenario("warm", streams=1, prompt=16, output=4)

FIGURES = {
    "one stream, decode tok/s": ("one", "decode_rate"),
    "8 streams, tok/s": ("8", "output_rate"),
    "16 streams, tok/s": ("16", "output_rate"),
    "prefill of 128, tok/s": ("one", "prefill_rate"),
    "prefill of 1,024, tok/s": ("prefill", "prefill_rate"),
    "16 × (512 shared + 32), s": ("shared", "wall"),
    "the same, prefix sent before, s": ("primed", "wall"),
    "start to first token, s": ("start", ""),
    "peak memory, MiB": ("peak_mib", ""),
}
"""What a table shows: its title, the scenario, and which of the scenario's figures."""

Rounds = list[dict[str, Any]]


def measure(peer: peers.Peer, names: list[str], repeat: int) -> dict[str, Any]:
    """One round of one server: start time, peak memory, and each scenario once."""
    with peers.RunningPeer(peer) as server:
        asyncio.run(load.run(server.url, "model", WARM_UP, repeat))
        result: dict[str, Any] = {"start": server.start_seconds}
        for name in names:
            measured = asyncio.run(load.run(server.url, "model", SCENARIOS[name], repeat))
            result[name] = asdict(measured)
            print(
                f"  {peer.name:20} {name:8} {measured.output_rate:7.1f} tok/s out"
                f"  decode {measured.decode_rate:6.1f}  prefill {measured.prefill_rate:6.1f}"
                f"  TTFT {measured.ttft_mean:7.0f} ms  ITL p50 {measured.itl_p50:6.1f}"
                f" p99 {measured.itl_p99:6.1f} ms",
                flush=True,
            )
        result["peak_mib"] = server.peak_mebibytes()
    print(
        f"  {peer.name:20} start {result['start']:.1f} s, peak {result['peak_mib']} MiB", flush=True
    )
    return result


def figures(rounds: Rounds) -> dict[str, float]:
    """Title of a figure to its median over the rounds, of the scenarios that were run."""
    return {
        title: statistics.median(r[name][key] if key else r[name] for r in rounds)
        for title, (name, key) in FIGURES.items()
        if name in rounds[0]
    }


def table(results: dict[str, Rounds]) -> str:
    """Two Markdown tables: a row a server, then a row for each quantd and each server after it."""
    medians = {name: figures(rounds) for name, rounds in results.items()}
    titles = list(next(iter(medians.values())))
    rule = "|---" * (len(titles) + 1) + "|"
    lines = ["| | " + " | ".join(titles) + " |", rule]
    for name, values in medians.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values.values()) + " |")
    lines += ["", "| ratio | " + " | ".join(titles) + " |", rule]
    for ours, theirs in combinations(medians, 2):
        if ours.startswith("quantd "):
            ratios = (medians[ours][title] / medians[theirs][title] for title in titles)
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {ours} / {theirs} | {cells} |")
    return "\n".join(lines)


def shown(peer: peers.Peer) -> list[str]:
    """A peer's command without the folders of this machine's programs."""
    here = f"{Path(__file__).parent}/"
    parts = [part.replace(here, "benchmarks/") for part in peer.command[1:]]
    return [Path(peer.command[0]).name, *parts]


def new_record(chosen: list[peers.Peer]) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "read_gb_per_s": [],
        "commands": {peer.name: shown(peer) for peer in chosen},
        "results": {peer.name: [] for peer in chosen},
    }


def resume(path: Path | None, chosen: list[peers.Peer]) -> dict[str, Any]:
    """The record to add rounds to. ValueError where the file is one of other servers."""
    record = new_record(chosen)
    if path is None or not path.exists():
        return record
    earlier: dict[str, Any] = json.loads(path.read_text())
    for key in ("machine", "commands"):
        if earlier[key] != record[key]:
            raise ValueError(f"{path} has another {key}: {earlier[key]}, not {record[key]}")
    return earlier


def parse_arguments() -> tuple[argparse.Namespace, list[peers.Peer]]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("servers", nargs="+", metavar="ENGINE:PATH[:QUANTIZATION]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenarios", default="one,8,16,prefill", help=", ".join(SCENARIOS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llama-server", default=shutil.which("llama-server") or "")
    parser.add_argument("--openvino-python", default="", help="Python that has openvino-genai")
    parser.add_argument("--vllm", default=shutil.which("vllm") or "")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    options.scenarios = options.scenarios.split(",")
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"--scenarios: {', '.join(sorted(unknown))} is none of {', '.join(SCENARIOS)}")
    programs = peers.Programs(
        options.threads, options.llama_server, options.openvino_python, options.vllm
    )
    try:
        return options, [peers.parse(text, programs) for text in options.servers]
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    options, chosen = parse_arguments()
    record = resume(options.json, chosen)
    print(machine.describe())
    for _ in range(options.rounds):
        repeat = len(record["read_gb_per_s"])
        bandwidth = machine.read_bandwidth()
        rate = f"{bandwidth:.1f} GB/s" if bandwidth else "unknown (no C compiler)"
        print(f"round {repeat + 1}: this machine reads {rate}", flush=True)
        measured = {peer.name: measure(peer, options.scenarios, repeat) for peer in chosen}
        record["read_gb_per_s"].append(bandwidth)
        for name, result in measured.items():
            record["results"][name].append(result)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1))
    print(table(record["results"]))


if __name__ == "__main__":
    main()
