"""What each policy is worth, by simulation of the real scheduler:

    python benchmarks/scheduling.py --json results/scheduling.json --svg results/scheduling.svg
    python benchmarks/scheduling.py --validate      # against a real daemon, which takes a minute

Without --measure a step costs what it costs a model of 1.24 B parameters on a CPU; with it, what it
costs the embedded model in a daemon that is started for it. Times are seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import chart
import machine
import replay
import traces
from ideal import least_left_first
from peers import RunningPeer
from simulator import Job, Outcome, Run, StepCost, percentile, simulate

from quantd.daemon.config import SchedulerSettings

POLICIES = ("fcfs", "priority", "sjf")
KNOWN = "sjf, known"
"""sjf that is told how long each output will be: what better estimates could bring."""
IDEAL = "least left"
"""`ideal.least_left_first`, which knows no aging."""
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
OVERLOAD = 1.2
"""Load of the trial of priorities: the batch is always full."""
VALIDATION = (("poisson", 0.5), ("bursts", 0.5), ("poisson", 0.8))
"""Traces and loads. The nearer to 1, the more a small error of the fit counts in every queue."""
HEADER = (
    f"{'trace':10} {'aging':>6} {'policy':10} {'ttft':>8} {'p99':>8} {'latency':>8} {'p99':>8} "
    f"{'longest wait':>12} {'aged':>5}"
)


def settings_of(arguments: argparse.Namespace, policy: str, aging: float) -> SchedulerSettings:
    return SchedulerSettings(
        policy=policy,  # type: ignore[arg-type]
        max_running=arguments.max_running,
        token_budget=arguments.token_budget,
        aging_seconds=aging,
        max_waiting=1 << 20,
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    ttfts = [outcome.ttft for outcome in outcomes]
    latencies = [outcome.latency for outcome in outcomes]
    return {
        "ttft_mean": statistics.mean(ttfts),
        "ttft_p99": percentile(ttfts, 99),
        "latency_mean": statistics.mean(latencies),
        "latency_p99": percentile(latencies, 99),
        "longest_wait": max(outcome.waited for outcome in outcomes),
        "aged": sum(outcome.aged for outcome in outcomes),
    }


class Trial:
    """Traces under one cost and one set of flags."""

    def __init__(self, arguments: argparse.Namespace, cost: StepCost) -> None:
        self._arguments = arguments
        self._cost = cost

    def _jobs(self, trace: str, seed: int, load: float) -> list[Job]:
        a = self._arguments
        return traces.make(trace, seed, a.count, load, self._cost, a.max_running)

    def _run(self, jobs: Sequence[Job], policy: str, aging: float) -> Run:
        settings = settings_of(self._arguments, policy.split(",")[0], aging)
        return simulate(jobs, settings, self._cost, lengths_known=policy == KNOWN)

    def _outcomes(self, jobs: Sequence[Job], policy: str, aging: float) -> Sequence[Outcome]:
        if policy == IDEAL:
            return least_left_first(jobs, settings_of(self._arguments, "fcfs", aging), self._cost)
        return self._run(jobs, policy, aging).outcomes

    def measure(self, trace: str, policy: str, load: float, aging: float) -> dict[str, float]:
        """The outcomes of all seeds together."""
        outcomes: list[Outcome] = []
        for seed in range(self._arguments.seeds):
            outcomes += self._outcomes(self._jobs(trace, seed, load), policy, aging)
        return summary(outcomes)

    def table(self) -> list[dict[str, Any]]:
        """Every trace under every policy at one load."""
        rows: list[dict[str, Any]] = []
        for trace in traces.TRACES:
            for i, aging in enumerate(self._arguments.aging):
                without_aging = ("fcfs", IDEAL) if i == 0 else ()
                for policy in (*without_aging, "priority", "sjf", KNOWN):
                    result = self.measure(trace, policy, self._arguments.load, aging)
                    rows.append({"trace": trace, "policy": policy, "aging": aging, **result})
                    print(_row(rows[-1]), flush=True)
        return rows

    def sweep(self, trace: str, aging: float) -> dict[str, list[tuple[float, float]]]:
        """Mean latency by load."""
        return {
            policy: [
                (load, self.measure(trace, policy, load, aging)["latency_mean"]) for load in LOADS
            ]
            for policy in POLICIES
        }

    def priority(self) -> dict[str, float]:
        """How much later than on an idle machine the first token of a HIGH job comes, while LOW
        ones fill the batch and wait."""
        aging = self._arguments.aging[0]
        later: list[float] = []
        step = 0.0
        for seed in range(self._arguments.seeds):
            jobs = self._jobs("poisson", seed, OVERLOAD)
            run = self._run(jobs, "priority", aging)
            step = max(step, run.longest_step)
            for job, outcome in zip(jobs, run.outcomes, strict=True):
                if job.priority == traces.HIGH:
                    alone = self._run([replace(job, arrival=0.0)], "priority", aging)
                    later.append(outcome.ttft - alone.outcomes[0].ttft)
        chunk = self._cost.step + self._cost.prefill_token * self._arguments.token_budget
        return {
            "jobs": len(later),
            "later_mean": statistics.mean(later),
            "later_p99": percentile(later, 99),
            "longest_step": step,
            "prefill_chunk": chunk,
            "bound": step + chunk,
        }


def _row(row: dict[str, Any]) -> str:
    return (
        f"{row['trace']:10} {row['aging']:6g} {row['policy']:10} {row['ttft_mean']:8.2f} "
        f"{row['ttft_p99']:8.2f} {row['latency_mean']:8.2f} {row['latency_p99']:8.2f} "
        f"{row['longest_wait']:12.2f} {row['aged']:5}"
    )


def against_fcfs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each order by work saves of fcfs's mean latency, and whether its longest wait is in
    bounds: whoever is overdue stands in order of arrival, so it waits aging_seconds and then at
    most as under fcfs."""
    found = []
    for row in rows:
        if row["policy"] not in ("sjf", KNOWN, IDEAL):
            continue
        [base] = [r for r in rows if r["policy"] == "fcfs" and r["trace"] == row["trace"]]
        entry = {name: row[name] for name in ("trace", "policy", "aging", "longest_wait")}
        entry["saved"] = 1 - row["latency_mean"] / base["latency_mean"]
        if row["policy"] != IDEAL:
            entry["bound"] = row["aging"] + base["longest_wait"]
        found.append(entry)
    return found


def validate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same trace through the simulator and through a daemon, both first come, first served."""
    settings = settings_of(arguments, "fcfs", 30.0)
    rows = []
    with RunningPeer(replay.demo(settings, arguments.model)) as daemon:
        for seed, (trace, load) in enumerate(arguments.trials or VALIDATION):
            cost = replay.fit(daemon.url, settings, seed)
            print("fitted:", {name: f"{value:.3g}" for name, value in asdict(cost).items()})
            jobs = replay.for_demo(
                traces.make(trace, seed, arguments.count, load, cost, arguments.max_running)
            )
            seen = asyncio.run(replay.replay(daemon.url, jobs))
            outcomes = simulate(jobs, settings, cost).outcomes
            row: dict[str, Any] = {
                "trace": trace,
                "load": load,
                "jobs": len(jobs),
                "cost": asdict(cost),
            }
            for i, name in enumerate(("ttft", "latency")):
                real = statistics.mean(times[i] for times in seen)
                simulated = statistics.mean(getattr(outcome, name) for outcome in outcomes)
                row[name] = {
                    "daemon": real,
                    "simulated": simulated,
                    "difference": simulated / real - 1,
                }
                print(
                    f"{trace}, load {load:g}: mean {name:7} daemon {real:.4f} s, "
                    f"simulated {simulated:.4f} s, difference {simulated / real - 1:+.1%}",
                    flush=True,
                )
            rows.append(row)
    return rows


def simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    cost = StepCost()
    if arguments.measure:
        settings = settings_of(arguments, "fcfs", 30.0)
        with RunningPeer(replay.demo(settings)) as daemon:
            cost = replay.fit(daemon.url, settings)
    trial = Trial(arguments, cost)
    print(f"load {arguments.load:g}, {arguments.seeds} x {arguments.count} jobs, {cost}")
    print(HEADER)
    record: dict[str, Any] = {"cost": asdict(cost), "rows": trial.table()}
    record["sjf"] = against_fcfs(record["rows"])
    for row in record["sjf"]:
        print(
            f"{row['policy']}; {row['trace']}, aging {row['aging']:g}: {row['saved']:.1%} less "
            f"mean latency than fcfs; longest wait {row['longest_wait']:.1f}, "
            f"bound {row.get('bound', 'none')}"
        )
    record["priority"] = trial.priority()
    print("priority at load", OVERLOAD, {k: round(v, 2) for k, v in record["priority"].items()})
    if arguments.svg:
        panels = [
            (f"Mean latency, poisson, aging_seconds {aging:g}", trial.sweep("poisson", aging))
            for aging in arguments.aging
        ]
        arguments.svg.write_text(chart.draw(panels, "load", "seconds"))
        record["sweep"] = dict(panels)
    return record


def _trial(text: str) -> tuple[str, float]:
    trace, _, load = text.partition(":")
    return trace, float(load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--count", type=int, default=300, help="jobs of a trace")
    parser.add_argument("--seeds", type=int, default=2, help="traces of each kind")
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--aging", type=float, nargs="+", default=[30.0, 300.0, 3000.0])
    parser.add_argument("--measure", action="store_true", help="costs of the embedded model")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--trials", type=_trial, nargs="+", help="for --validate: poisson:0.5")
    parser.add_argument("--model", default="", help="for --validate: a folder or a file")
    parser.add_argument("--json", type=Path, help="adds to this file what was found")
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    record = validate(arguments) if arguments.validate else simulated(arguments)
    if arguments.json:
        path: Path = arguments.json
        found = json.loads(path.read_text()) if path.exists() else {}
        kind = "validation" if arguments.validate else "simulation"
        if arguments.measure:
            kind += ", embedded model"
        found[f"{kind}, token budget {arguments.token_budget}"] = {
            "command": " ".join(["python", "benchmarks/scheduling.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": machine.describe(),
            "found": record,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
