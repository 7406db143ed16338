from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quantd.daemon.config import (
    LogSettings,
    ModelSettings,
    ServerSettings,
    Settings,
    diff,
    in_force,
)


def model(name: str, path: str = "/m") -> ModelSettings:
    return ModelSettings(name=name, path=Path(path))


OLD = Settings(models={"a": model("a"), "b": model("b")})


def test_no_change() -> None:
    assert not diff(OLD, OLD)


def test_live_and_restart() -> None:
    new = replace(
        OLD,
        log=LogSettings(level="debug", format="json"),
        server=ServerSettings(port=1, drain_seconds=2),
        models={"b": model("b", "/other"), "c": model("c")},
    )
    changes = diff(OLD, new)
    assert changes.live == ("server.drain_seconds", "log.level")
    assert changes.restart == ("server.port", "log.format")
    assert changes.models_added == ("c",)
    assert changes.models_removed == ("a",)
    assert changes.models_changed == ("b",)
    assert changes.lines() == [
        "server.drain_seconds has changed",
        "log.level has changed",
        "server.port has changed and needs a restart",
        "log.format has changed and needs a restart",
        "model c is new",
        "model a is gone",
        "model b has changed",
    ]

    now = in_force(OLD, new)
    assert (now.server.port, now.server.drain_seconds) == (8420, 2)
    assert (now.log.level, now.log.format) == ("debug", "auto")
    assert now.models == new.models
    assert diff(now, new).restart == changes.restart, "still pending after the reload"
