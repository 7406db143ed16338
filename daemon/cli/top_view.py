"""What `quantd top` shows: from two looks at a daemon to lines of text. No terminal, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantd.daemon.cli.screen import size, table

_TIERS = (
    ("device", "used", "cached", "free"),
    ("host", None, "host_cached", "host_free"),
    ("disk", None, "disk_cached", "disk_free"),
)
_BAR = 30


@dataclass(frozen=True, slots=True)
class Look:
    """The daemon at one moment."""

    at: float
    """Seconds of a monotonic clock."""
    models: list[dict[str, Any]]
    """Of /admin/models."""
    engines: Mapping[str, dict[str, Any]]
    """Of /admin/state, by model."""

    def as_json(self) -> dict[str, Any]:
        return {"models": self.models, "engines": self.engines}


def lines(now: Look, before: Look | None, only: str | None = None) -> list[str]:
    """Everything, as wide and long as it is; rates are between the two looks."""
    shown: list[str] = []
    for model in now.models:
        if only is None or only in (model["name"], *model["aliases"]):
            shown += _model(model, now, before)
            shown.append("")
    return shown[:-1]


def fit(text: list[str], columns: int, rows: int) -> list[str]:
    """Cut to a terminal's size; the last line says what is missing."""
    if len(text) > rows > 0:
        missing = len(text) - rows + 1
        text = [*text[: rows - 1], f"… {missing} lines more"]
    return [line[: max(columns, 0)] for line in text[: max(rows, 0)]]


def _model(model: dict[str, Any], now: Look, before: Look | None) -> list[str]:
    state = model["state"]
    if state == "loading":
        state += f" {model['stage']} {model['progress']:.0%}"
    head = f"{model['name']}  {state}"
    if model["reason"]:
        head += f"  {model['reason']}"
    engine = now.engines.get(model["name"])
    if engine is None:
        return [head]
    former = before.engines.get(model["name"]) if before is not None else None
    seconds = 0.0 if before is None else now.at - before.at
    text = [
        f"{head}  running {engine['running']}  waiting {engine['waiting']}",
        _rates(engine, former, seconds),
    ]
    text += _tiers(engine["kv"])
    if engine["requests"]:
        text += table([_HEADER, *map(_request, engine["requests"])]).split("\n")
    return text


def _rates(engine: dict[str, Any], former: dict[str, Any] | None, seconds: float) -> str:
    prompt, cached = engine["prompt_tokens"], engine["cached_tokens"]
    hits = f"{cached / prompt:.0%}" if prompt else "-"
    preemptions = sum(engine["preemptions"].values())
    rates = [_rate(engine, former, seconds, f"{name}_tokens") for name in ("prompt", "generated")]
    return (
        f"prompt {rates[0]} tok/s  generated {rates[1]} tok/s  prefix hits {hits}  "
        f"preempted {preemptions}  finished {engine['finished']}"
    )


def _rate(engine: dict[str, Any], former: dict[str, Any] | None, seconds: float, name: str) -> str:
    # A model that was loaded anew between the two looks counts from nothing.
    if former is None or seconds <= 0 or engine[name] < former[name]:
        return "-"
    return f"{(engine[name] - former[name]) / seconds:.1f}"


def _tiers(kv: dict[str, Any]) -> list[str]:
    text = []
    for tier, used, cached, free in _TIERS:
        counts = [kv[used] if used else 0, kv[cached], max(0, kv[free])]
        total = sum(counts)
        if total == 0:
            continue
        ends = [round(_BAR * sum(counts[: i + 1]) / total) for i in range(3)]
        drawn = "█" * ends[0] + "▒" * (ends[1] - ends[0]) + "·" * (ends[2] - ends[1])
        held = size((counts[0] + counts[1]) * kv["block_bytes"])
        said = f"used {counts[0]}  cached {counts[1]}  free {counts[2]}" if used else ""
        said = said or f"cached {counts[1]}  free {counts[2]}"
        out, back = kv["moved_blocks"].get(f"out_{tier}"), kv["moved_blocks"].get(f"in_{tier}")
        moved = f"  out {out}  in {back}" if out is not None else ""
        text.append(f"{tier:6} {drawn} {held}  {said}{moved}")
    if kv["disk_problem"]:
        text.append(f"disk   rests: {kv['disk_problem']}")
    return text


_HEADER = ["REQUEST", "CALLER", "PHASE", "PROMPT", "CACHED", "OUTPUT", "AGE", "QUEUED", "PREEMPTED"]


def _request(request: dict[str, Any]) -> list[str]:
    done = min(request["computed_tokens"], request["prompt_tokens"])
    queued = request["queue_seconds"]
    return [
        request["id"],
        request["caller"] or "-",
        request["phase"],
        f"{done}/{request['prompt_tokens']}",
        str(request["cached_tokens"]),
        f"{request['output_tokens']}/{request['max_tokens']}",
        f"{request['age']:.1f} s",
        "-" if queued is None else f"{queued:.1f} s",
        str(request["preemptions"]),
    ]
