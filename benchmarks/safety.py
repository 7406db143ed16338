"""What the safety filter costs: alone, by token and by kilobyte, and in the daemon's own process.

    python benchmarks/safety.py
    python benchmarks/safety.py --json results/safety.json

Alone: answers of words come in tokens of five characters, prompts in one piece; nothing is found in
them. The daemon is that of overhead.py, whose worker answers at once, without a policy and with
each; CPU is the daemon's process alone. A guard costs what its model costs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import machine
import overhead
import shapes

from quantd.daemon.config import PolicySettings, RuleSettings, SafetySettings, Settings
from quantd.daemon.safety.policy import compile_policies
from quantd.daemon.safety.stream import StreamFilter
from quantd.daemon.server.screening import Text, read

_WORDS = tuple(f"word{number}x" for number in range(1000))
RULES = {
    "words": RuleSettings(name="words", words=_WORDS),
    "pii": RuleSettings(name="pii", pii=("email", "phone", "iban", "card", "ip", "ssn")),
    "patterns": RuleSettings(name="patterns", patterns=(r"project[ -]\d+", r"secret\w* \w+ key")),
}
POLICIES = {
    "words": ("words",),
    "personal data": ("pii",),
    "all": ("words", "pii", "patterns"),
}
"""Name → categories."""


def settings(categories: tuple[str, ...]) -> SafetySettings:
    actions = dict.fromkeys(categories, "redact")
    policy = PolicySettings(name="main", input=actions, output=actions)  # type: ignore[arg-type]
    return SafetySettings(rules=RULES, policies={"main": policy})


def alone(categories: tuple[str, ...]) -> dict[str, float]:
    policy = compile_policies(Settings(safety=settings(categories))).by_name["main"]
    screen = policy.output.screen
    assert screen is not None
    stream = StreamFilter(screen)
    tokens = [" this", " here", " goes", " past"] * 5000
    start = time.process_time()
    for token in tokens:
        stream.feed(token)
    per_token = 1e6 * (time.process_time() - start) / len(tokens)
    row = {"us_per_token": per_token, "held_chars": float(screen.held)}
    prompts = {
        "ascii": "The quick brown fox jumps over the lazy dog. " * 23,
        "other": "Съешь же ещё этих мягких французских булок. " * 13,
    }
    for name, text in prompts.items():
        size = len(text.encode()) / 1024
        rounds = 300
        read(screen, [Text(text, False)])
        start = time.process_time()
        for _ in range(rounds):
            read(screen, [Text(text, False)])
        row[f"us_per_kb_{name}"] = 1e6 * (time.process_time() - start) / rounds / size
    text = prompts["ascii"] * 1024
    times = []
    for _ in range(20):
        start = time.process_time()
        read(screen, [Text(text, False)])
        times.append(1e3 * (time.process_time() - start))
    row["ms_per_mb_worst_of_20"] = max(times) * (1 << 20) / len(text)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=800, help="per stream")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
    }
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shapes.write_tiny(model)
        served = overhead.measure(overhead.serve_quantd, model, arguments.streams, arguments.tokens)
        record["off"] = {"daemon": served}
        print(f"off: {served['cpu_us_per_token']:.1f} µs CPU per token in the daemon", flush=True)
        for name, categories in POLICIES.items():
            row = alone(categories)
            serve = partial(overhead.serve_quantd, safety=settings(categories))
            served = overhead.measure(serve, model, arguments.streams, arguments.tokens)
            record[name] = {**row, "daemon": served}
            print(
                f"{name}: {row['us_per_token']:.1f} µs per token, "
                f"{row['us_per_kb_ascii']:.1f} µs per KB of ASCII, "
                f"{row['us_per_kb_other']:.1f} µs per KB of Cyrillic, "
                f"{row['ms_per_mb_worst_of_20']:.1f} ms per MB at worst of 20, "
                f"at most {row['held_chars']:.0f} characters held back; "
                f"{served['cpu_us_per_token']:.1f} µs CPU per token in the daemon",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
