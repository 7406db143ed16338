"""A GPU: its own rates, quantd's kernels held against them, a whole model in the worker's runner.

    python benchmarks/gpu.py --json results.json            # under nine minutes on an H100
    python benchmarks/gpu.py --quick                        # about three
    python benchmarks/gpu.py --device cpu                   # tiny shapes: does the script work?

For each kernel: microseconds (median, by events, the last cache flushed before each call), the
fraction that the least time for its bytes and operations is of that, and what a peer takes in the
same run. Nothing that fails ends the run: it is in the table. What the time does not suffice for is
left out and said. With --json the file is written again after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PARTS = ("rates", "kernels", "models")
_TAKES = 75
"""Seconds that a whole model is thought to take before one did."""
_MODELS = 0.5
"""The share of the time that kernels leave to whole models."""


def versions(device: Any) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["capability"] = list(torch.cuda.get_device_capability(device))
    try:
        asked = (
            "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode"
        )
        command = ["nvidia-smi", asked, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        found["nvidia_smi"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["nvidia_smi"] = f"{type(error).__name__}"
    return found


class Report:
    """What was measured so far: printed as it comes, and in the file."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.data: dict[str, Any] = {"kernels": [], "models": [], "left_out": []}
        self._path = path
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def write(self) -> None:
        if self._path is not None:
            beside = self._path.with_name(self._path.name + ".part")
            beside.write_text(json.dumps(self.data, indent=1))
            os.replace(beside, self._path)

    def leave_out(self, name: str) -> None:
        self.data["left_out"].append(name)
        print(f"left out, no time: {name}", flush=True)
        self.write()

    def kernel(self, row: dict[str, Any]) -> None:
        self.data["kernels"].append(row)
        print(kernel_line(row), flush=True)
        self.write()

    def model(self, row: dict[str, Any]) -> None:
        self.data["models"].append(row)
        for line in model_lines(row):
            print(line, flush=True)
        self.write()


def kernel_line(row: dict[str, Any]) -> str:
    title = f"{row['group']}: {row['name']}"
    problem = row.get("error") or row.get("skipped")
    if problem:
        return f"{title:58} {problem}"
    aim = "" if row["aim"] is None else f" (aim {row['aim']:.0%})"
    cells = [
        f"{title:58} {row['us']:10.1f} us, launch {row['launch_us']:6.1f} us,"
        f" {row['fraction']:6.1%} of {row['bound']}{aim}"
    ]
    for name, took in row["peers"].items():
        if isinstance(took, str):
            cells.append(f"{name}: {took}")
        else:
            cells.append(f"{name} {took:.1f} us = {took / row['us']:.2f}x")
    return "; ".join(cells)


def model_lines(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [f"model {row['name']}: {row['error']}"]
    gib = 1 << 30
    lines = [
        f"model {row['name']}: loaded in {row['load_seconds']:.1f} s, weights"
        f" {row['weight_bytes'] / gib:.2f} GiB, pool {row['kv_bytes'] / gib:.2f} GiB, memory used"
        f" {row['used_bytes'] / gib:.2f} GiB, {row['quantizers']}"
    ]
    lines += [f"    note: {note}" for note in row["notes"]]
    for step in row["decode"]:
        if "error" in step:
            lines.append(f"    {step['name']} streams: {step['error']}")
            continue
        lines.append(
            f"    {step['streams']:4} streams: {step['tokens_per_second']:9.1f} tok/s, step"
            f" {step['step_ms']:.2f} ms (slowest {step['slowest_ms']:.2f}), device busy"
            f" {step['device_ms']:.2f} ms, gap {step['gap_ms']:.2f} ms, {step['fraction']:.1%} of"
            " the memory's limit"
        )
    for prompt in row["prefill"]:
        said = prompt.get("error") or f"{prompt['tokens_per_second']:.0f} tok/s"
        lines.append(f"    prompts {prompt['name']}: {said}")
    return lines


def run_kernels(report: Report, clock: Any, options: argparse.Namespace) -> None:
    import gpu_kernels
    import gpu_linear
    from gpu_clock import measure

    tiny = clock.device.type == "cpu"
    rates = report.data["rates"]
    kept = 0.0 if options.only and "models" not in options.only else _MODELS * options.seconds
    for module in (gpu_kernels, gpu_linear):
        for case in module.cases(clock.device, options.quick, tiny):
            name = f"{case.group}: {case.name}"
            if options.match not in name:
                continue
            if report.seconds_left < kept:
                report.leave_out(name)
                continue
            report.kernel(measure(case, clock, rates))


def run_models(report: Report, clock: Any, options: argparse.Namespace) -> None:
    from gpu_model import Plan, formats, measure_model, tiny_plan

    tiny = clock.device.type == "cpu"
    plan = tiny_plan() if tiny else Plan()
    if options.layers is not None:
        plan.config["num_hidden_layers"] = options.layers
    if options.quick and not tiny:
        plan.streams, plan.prompts = (1, 64), ((1, 2048),)
    wanted = formats(plan.config["num_hidden_layers"])
    if options.quick:
        wanted = {name: wanted[name] for name in ("bf16", "GPTQ, 4 bits")}
    longest = 0.0 if tiny else _TAKES
    for name, format in wanted.items():
        if options.match not in f"model {name}":
            continue
        if report.seconds_left < longest:
            report.leave_out(f"model {name}")
            continue
        start = time.monotonic()
        report.model(measure_model(name, format, plan, clock.device, report.data["rates"]))
        longest = time.monotonic() - start


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="some of the rows")
    parser.add_argument("--only", choices=PARTS, action="append", help="rates are always measured")
    parser.add_argument("--match", default="", help="rows whose name has this in it")
    parser.add_argument("--layers", type=int, help="of the whole models, instead of 32")
    parser.add_argument("--repeats", type=int, default=30, help="of a kernel, at most")
    parser.add_argument("--seconds", type=float, default=530, help="no row is begun after")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    report = Report(options.json, options.seconds)
    import torch
    from gpu_clock import Clock, measure_rates

    from quantd.kernels import ops

    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu runs tiny shapes", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    report.data["versions"] = versions(device)
    for name, value in report.data["versions"].items():
        print(f"{name}: {value}")
    report.data["notes"] = list(ops.notes(torch.bfloat16, device))
    for note in report.data["notes"]:
        print(f"note: {note}")
    only = options.only or PARTS
    with torch.inference_mode():
        clock = Clock(device, options.repeats)
        rates = measure_rates(clock, device.type == "cpu")
        report.data["rates"] = rates
        print(
            ", ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in rates.items()), flush=True
        )
        report.write()
        if "kernels" in only:
            run_kernels(report, clock, options)
        if "models" in only:
            # The clock's memory is needed there.
            clock.release()
            run_models(report, clock, options)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
