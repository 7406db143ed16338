"""What a log line looks like in each of its places."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from quantd.daemon.config import Environment, LogSettings
from quantd.daemon.telemetry.logging import configure

log = structlog.get_logger("quantd.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_off_a_terminal() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    log.info("model loaded", model="a", seconds=1.5, path=Path("/m"))
    line = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line.pop("path") in ("PosixPath('/m')", "/m")
    assert line == {"event": "model loaded", "level": "info", "model": "a"} | {
        "seconds": 1.5,
        "logger": "quantd.test",
    }


def test_text_on_a_terminal() -> None:
    stream = Terminal()
    configure(LogSettings(), Environment(no_color=True), stream)
    log.warning("slow reader", request="x")
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[warning\] slow reader +request=x\n", stream.getvalue())
    stream.truncate(0)
    configure(LogSettings(), Environment(), stream)
    log.warning("slow reader")
    assert "\x1b[" in stream.getvalue()


def test_an_exception_stays_one_json_line() -> None:
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("step failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("error", 1)])
def test_levels(level: str, shown: int) -> None:
    stream = io.StringIO()
    configure(LogSettings(level=level, format="json"), stream=stream)
    for method in (log.debug, log.info, log.warning, log.error):
        method("x")
    assert stream.getvalue().count("\n") == shown


def test_the_level_changes_for_loggers_that_are_there() -> None:
    stream = io.StringIO()
    configure(LogSettings(level="error"), stream=stream)
    log.info("hidden")
    configure(LogSettings(level="info"), stream=stream)
    log.info("shown")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["shown"]


def test_libraries_take_the_same_way() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    logging.getLogger("aiohttp.server").error("bad %s", "thing")
    logging.getLogger("aiohttp.access").info("GET /")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"]) == ("bad thing", "error")


def journal(tmp_path: Path, settings: LogSettings) -> str:
    with (tmp_path / "stream").open("w+") as stream:
        status = os.fstat(stream.fileno())
        environment = Environment(journal_stream=(status.st_dev, status.st_ino))
        configure(settings, environment, stream)
        log.error("down")
        try:
            raise ValueError("broken")
        except ValueError:
            log.warning("careful", exc_info=True)
        stream.seek(0)
        return stream.read()


def test_the_journal_gets_priorities_and_no_time(tmp_path: Path) -> None:
    error, warning = journal(tmp_path, LogSettings()).splitlines()
    assert error == '<3>{"event":"down","level":"error","logger":"quantd.test"}'
    assert warning.startswith('<4>{"event":"careful"')


def test_each_line_of_a_traceback_has_its_priority(tmp_path: Path) -> None:
    lines = journal(tmp_path, LogSettings(format="console")).splitlines()
    assert lines[0].startswith("<3>")
    assert len(lines) > 3
    assert all(line.startswith("<4>") for line in lines[1:])


def test_a_file_is_not_the_journal_because_the_variable_is_inherited(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        configure(LogSettings(), Environment(journal_stream=(1, 2)), stream)
        log.info("x")
        stream.seek(0)
        assert stream.read().startswith("{")


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_log_that_is_gone_stops_nothing() -> None:
    configure(LogSettings(), stream=Gone())
    log.info("nobody hears")
