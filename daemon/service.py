"""The composition root: sockets, models, signals, the service manager, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from quantd.daemon.config import Changes, Environment, Settings, diff, in_force
from quantd.daemon.errors import ConfigError
from quantd.daemon.listeners import Faces, Listener, open_listeners
from quantd.daemon.notify import Notifier
from quantd.daemon.telemetry import logging
from quantd.daemon.telemetry.logging import LogStream
from quantd.daemon.telemetry.metrics import Metrics, ModelSample

if TYPE_CHECKING:
    from quantd.daemon.fleet import ModelStatus

_log = structlog.get_logger("quantd.service")

_CLOSE_SECONDS = 5.0
"""How long each step of the end may take beside what runs: ending workers, last bytes."""
_FREEZE_SECONDS = 1.0
_COLLECT_AFTER = 20_000
_OPEN_FILES = 65_536
"""As the unit file has it."""

OnModels = Callable[["list[ModelStatus]"], None]
"""Called with all models whenever one changes its state or gets on with loading."""


def run(service: Service) -> int:
    """Runs the daemon to its end; returns the exit status. Main thread only."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(service.run())
        if service.is_stuck:
            os._exit(status)  # the runner would wait for what is stuck
        return status


class Service:
    """The running daemon; run once."""

    def __init__(
        self,
        settings: Settings,
        environment: Environment,
        read_settings: Callable[[], Settings],
        log_stream: LogStream | None = None,
        on_models: OnModels | None = None,
    ) -> None:
        """`read_settings` reads the configuration again, or raises ConfigError. Without
        `on_models`, what a loading model is at is logged."""
        self._settings = settings
        self._environment = environment
        self._read_settings = read_settings
        self._log_stream = log_stream
        self._on_models = on_models
        self._notifier = Notifier(environment.notify_socket)
        self.is_stuck = False
        """Something did not end in its time, and may never."""
        self._stages: dict[str, str] = {}
        """What each loading model was at when its last change was logged."""
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run(self) -> int:
        """From the first socket to the last byte; 0, or 1 if a second signal cut the end short.

        Raises ConfigError: an address cannot be used, or the API keys cannot be read.
        """
        self._configure_logging()
        self._handle_signals()
        _allow_connections()
        # Bound before the web framework is imported, which is most of the start: a client that
        # comes now waits for a moment instead of being refused.
        listeners = open_listeners(self._settings.server)
        try:
            faces = await self._start(listeners)
            await self._stop.wait()
            return await self._end(faces)
        finally:
            for listener in listeners:
                listener.close()
            self._notifier.close()

    async def _start(self, listeners: list[Listener]) -> Faces:
        from quantd.daemon.fleet import Fleet
        from quantd.daemon.server.auth import ApiKeys
        from quantd.daemon.server.state import State

        self._keys = ApiKeys.from_file(self._settings.server.api_keys_file)
        metrics = Metrics()
        self._fleet = Fleet(self._settings, metrics, on_change=self._on_change)
        metrics.watch(lambda: map(_sample, self._fleet.models()))
        self._state = State(self._settings, self._fleet, metrics)
        faces = await self._open_faces(listeners, metrics)
        addresses = " and ".join(listener.address for listener in listeners)
        _log.info(f"listening on {addresses}")
        self._warn_if_open(listeners)
        self._notifier.ready()
        self._start_watchdog()
        self._fleet.preload()
        self._state.resume()
        asyncio.get_running_loop().call_later(_FREEZE_SECONDS, settle)
        return faces

    async def _open_faces(self, listeners: list[Listener], metrics: Metrics) -> Faces:
        """One application for TCP, one for the Unix socket, which may also administer."""
        from quantd.daemon.server.admin import AdminActions
        from quantd.daemon.server.app import create_app, create_runner

        async def reload() -> list[str]:
            return self.reload().lines()

        server, keys, state = self._settings.server, self._keys, self._state
        actions = AdminActions(reload=reload, drain=self._on_stop)
        faces = Faces()
        tcp = [listener for listener in listeners if not listener.is_unix]
        unix = [listener for listener in listeners if listener.is_unix]
        if tcp:
            app = create_app(server, self._fleet, metrics, keys=keys, state=state)
            await faces.add(create_runner(app), tcp)
        if unix:
            app = create_app(server, self._fleet, metrics, admin=actions, state=state)
            await faces.add(create_runner(app), unix)
        return faces

    # --- the end -----------------------------------------------------------------------------

    async def _end(self, faces: Faces) -> int:
        """Lets running requests finish, ends the models, then the connections."""
        seconds = self._settings.server.drain_seconds
        self._notifier.stopping(seconds + 6 * _CLOSE_SECONDS)
        self._notifier.status("finishing the running requests")
        _log.info("stopping", drain_seconds=seconds)
        faces.release_inherited()
        await self._within(_CLOSE_SECONDS, "batches", self._state.stop())
        await self._within(seconds + _CLOSE_SECONDS, "requests", self._fleet.drain(seconds))
        await self._within(_CLOSE_SECONDS, "models", self._fleet.close())
        await self._within(_CLOSE_SECONDS, "connections", faces.close())
        await self._within(_CLOSE_SECONDS, "the store", self._state.close())
        _log.info("stopped")
        return int(self._stop_now.is_set())

    async def _within(self, seconds: float, what: str, work: Coroutine[Any, Any, object]) -> None:
        """Waits for `work`, but not longer than this, and not after the second signal."""
        task = asyncio.create_task(work)
        now = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait((task, now), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        now.cancel()
        if task.done():
            task.result()
            return
        if not self._stop_now.is_set():
            _log.error("the end takes too long and is cut short", what=what)
            self.is_stuck = True
        task.cancel()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_stop(self) -> None:
        """The first one drains, the second one ends at once."""
        (self._stop_now if self._stop.is_set() else self._stop).set()

    # --- reload ------------------------------------------------------------------------------

    def _on_hangup(self) -> None:
        with suppress(ConfigError):  # it is in the log
            self.reload()

    def reload(self) -> Changes:
        """Reads the configuration and the keys again, and applies what can be; says what.

        Raises ConfigError; then all is as it was before.
        """
        from quantd.daemon.safety import read_policies
        from quantd.daemon.server.auth import read_keys

        self._notifier.reloading()
        try:
            new = self._read_settings()
            file = self._settings.server.api_keys_file
            keys = None if file is None else read_keys(file)
            policies = read_policies(new)
        except ConfigError as error:
            _log.error("reload refused, the former configuration stays", reason=str(error))
            raise
        finally:
            self._notifier.ready()
        changes = diff(self._settings, new)
        self._settings = in_force(self._settings, new)
        if keys is not None:
            self._keys.replace(keys)
        self._state.policies = policies
        self._configure_logging()
        self._fleet.reconfigure(self._settings.models)
        _log.info("reloaded", changes=changes.lines())
        return changes

    # --- watching ----------------------------------------------------------------------------

    def _on_change(self, status: ModelStatus) -> None:
        models = self._fleet.models()
        if self._on_models is not None:
            self._on_models(models)
        elif status.stage != self._stages.get(status.name, ""):
            self._stages[status.name] = status.stage
            if status.stage:
                _log.info("loading", model=status.name, stage=status.stage)
        if not self._stop.is_set():
            self._notifier.status(summary(models))

    def _start_watchdog(self) -> None:
        """Feeds systemd's watchdog from the event loop, so that a loop that hangs is restarted."""
        usec = self._environment.watchdog_usec
        if usec is None:
            return
        loop = asyncio.get_running_loop()

        def feed() -> None:
            self._notifier.watchdog()
            loop.call_later(usec / 2e6, feed)

        feed()

    def _configure_logging(self) -> None:
        logging.configure(self._settings.log, self._environment, self._log_stream)

    def _warn_if_open(self, listeners: list[Listener]) -> None:
        if self._keys.required:
            return
        for listener in listeners:
            if not listener.is_local:
                _log.warning(
                    "everybody who can reach this address may use it; set server.api_keys_file",
                    address=listener.address,
                )


def _allow_connections() -> None:
    """A file for each: shells' soft limit of 1,024 is for programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def settle() -> None:
    """What is there by now stays: without this, every full collection would look at it again. Not
    at once, because it takes a while and the first client is waiting. A token's objects are in no
    cycle and go without the collector, so it need not look after every 700 of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def summary(models: list[ModelStatus]) -> str:
    """One line for `systemctl status`."""
    ready = sum(model.state == "ready" for model in models)
    failed = [model.name for model in models if model.state == "failed"]
    text = f"{ready} of {len(models)} models in memory"
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


def _sample(status: ModelStatus) -> ModelSample:
    stats = status.stats
    if stats is None:
        return ModelSample(model=status.name, state=status.state)
    return ModelSample(
        model=status.name,
        state=status.state,
        requests_running=stats.running,
        requests_waiting=stats.waiting,
        kv=stats.kv,
    )
