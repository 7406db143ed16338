"""Log lines: structlog to stderr, as text on a terminal and as JSON anywhere else.

Others call `structlog.get_logger("quantd.room")` at module level and log an event with its values
as keywords. No prompt, no generated text and no key is ever logged.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal, Protocol

import structlog
from structlog.typing import EventDict, WrappedLogger

from quantd.daemon.config import Environment, LogSettings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog's numbers: the journal reads them from "<N>" at a line's start (sd-daemon(3))."""


class LogStream(Protocol):
    """What lines are written to; `sys.stderr` is one."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


def configure(
    settings: LogSettings, environment: Environment | None = None, stream: LogStream | None = None
) -> None:
    """Sets how this process logs. May be called again, for instance on reload."""
    environment = Environment() if environment is None else environment
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    journal = _is_journal(stream, environment)
    style = settings.format
    if style == "auto":
        style = "console" if terminal else "json"
    level = _LEVELS[settings.level]
    structlog.configure(
        processors=_processors(style, terminal and not environment.no_color, journal),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _Lines(stream, *names),
        cache_logger_on_first_use=False,  # else a module's logger would keep its first level
    )
    # What libraries log through the standard module takes the same way; aiohttp's access log is
    # ours to write, and asyncio says little below a warning that a user could act on.
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[_Bridge()], force=True)
    logging.raiseExceptions = False


class _Lines:
    """Writes whole lines; a log that cannot be written never stops the daemon."""

    def __init__(self, stream: LogStream, name: str = "") -> None:
        self._stream = stream
        self.name = name

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = exception = log = msg


class _Bridge(logging.Handler):
    """Records of the standard logging module, as structlog events."""

    def emit(self, record: logging.LogRecord) -> None:
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
        logger = structlog.get_logger(record.name)
        logger.log(level, record.getMessage(), exc_info=record.exc_info)


def _processors(
    style: Literal["json", "console"], colors: bool, journal: bool
) -> list[structlog.typing.Processor]:
    chain: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
    ]
    if not journal:  # the journal has its own clock
        utc = style == "json"
        form = "iso" if utc else "%H:%M:%S"
        chain.append(structlog.processors.TimeStamper(fmt=form, utc=utc))
    render: structlog.typing.Processor
    if style == "json":
        chain.append(_add_name)
        chain.append(structlog.processors.format_exc_info)
        render = structlog.processors.JSONRenderer(serializer=_json)
    else:
        render = structlog.dev.ConsoleRenderer(
            colors=colors,
            pad_event_to=0,
            pad_level=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    return [*chain, _with_priority(render) if journal else render]


def _add_name(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["logger"] = logger.name
    return event


def _with_priority(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """Puts the priority before each line, because the journal splits at line ends."""

    def prefixed(logger: WrappedLogger, method: str, event: EventDict) -> str:
        prefix = f"<{_PRIORITY.get(event.get('level', 'info'), 6)}>"
        text = str(render(logger, method, event))
        return "\n".join(prefix + line for line in text.split("\n"))

    return prefixed


def _json(event: EventDict, **_: Any) -> str:
    import msgspec

    return msgspec.json.encode(event, enc_hook=repr).decode()


def _is_journal(stream: LogStream, environment: Environment) -> bool:
    """Whether this very stream goes to the journal: the variable is inherited by redirections."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.journal_stream == (status.st_dev, status.st_ino)
