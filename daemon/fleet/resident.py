"""A model in memory: its worker, its engine and its tokenizer; and how it gets there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from quantd.daemon.config import ModelSettings, SchedulerSettings
from quantd.daemon.engine.engine import Engine
from quantd.daemon.engine.executor import Executor, OnProgress
from quantd.daemon.engine.metrics import EngineMetrics
from quantd.daemon.errors import QuantdError, RequestError, Unavailable
from quantd.daemon.grammar import SeenGrammars
from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import DiskIndex
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.kv.window import Window
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.text import TextModel
from quantd.daemon.types import Grammar, LoadModel, ModelInfo, TokenTable

_log = structlog.get_logger("quantd.fleet")


class LoadedExecutor(Executor, Protocol):
    """An executor whose model is in memory."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def pid(self) -> int: ...

    def set_tokens(self, table: TokenTable) -> None: ...

    def compile(self, grammar: Grammar) -> asyncio.Future[str | None]: ...


StartExecutor = Callable[[LoadModel, OnProgress], Awaitable[LoadedExecutor]]
LoadText = Callable[[Path, int | None, str], TextModel]
"""(checkpoint, max_context, tool_dialect); blocking, called in a thread."""


class FleetMetrics(Protocol):
    def engine(self, model: str) -> EngineMetrics: ...


class Resident:
    """One loaded model. Made by `Loader.load`, ended by `close`, used once."""

    def __init__(self, executor: LoadedExecutor, engine: Engine, text: TextModel) -> None:
        self._executor = executor
        self.engine = engine
        self.text = text
        self.run = asyncio.create_task(engine.run())
        """Ends with the engine; its result is why."""
        self._tokens: asyncio.Task[None] | None = None
        """Gives the worker what grammars need to know; begun with the first one."""
        self._compiled = SeenGrammars()

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @property
    def pid(self) -> int:
        return self._executor.pid

    async def prepare(self, grammar: Grammar) -> None:
        """Returns when a sequence with this grammar may be submitted, and no step will wait for
        its compiler. Raises RequestError for one that this model cannot follow."""
        if self._tokens is None:
            self._tokens = asyncio.create_task(self._send_tokens())
        await asyncio.shield(self._tokens)
        if grammar in self._compiled:
            return
        error = await self._executor.compile(grammar)
        if error is not None:
            raise RequestError(f"the grammar cannot be used: {error}")
        self._compiled.add(grammar)

    async def _send_tokens(self) -> None:
        self._executor.set_tokens(await asyncio.to_thread(self.text.token_table))

    async def close(self) -> None:
        """Ends its requests with an error, and its worker. Idempotent."""
        await self.engine.close()
        await asyncio.wait([self.run])


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """All that it takes to load any model."""

    scheduler: SchedulerSettings
    metrics: FleetMetrics
    start_executor: StartExecutor
    load_text: LoadText
    clock: Callable[[], float] = time.monotonic

    async def load(self, model: ModelSettings, on_progress: OnProgress) -> Resident:
        """Starts the worker, and reads the tokenizer beside it. When either fails, or the caller
        is cancelled, nothing is left. Raises `Unavailable` or `ModelRefused`."""
        text = asyncio.create_task(self._load_text(model))
        worker = asyncio.ensure_future(
            self.start_executor(_frame(model, self.scheduler), on_progress)
        )
        try:
            # The first error counts; a missing tokenizer need not wait for 30 GB of weights.
            await asyncio.gather(worker, text)
        except BaseException:
            text.cancel()
            await _discard(worker)
            raise
        executor = worker.result()
        scheduler = _scheduler(executor.info, model, self.scheduler)
        metrics = self.metrics.engine(model.name)
        engine = Engine(executor, executor.info, scheduler, metrics, self.clock)
        return Resident(executor, engine, text.result())

    async def _load_text(self, model: ModelSettings) -> TextModel:
        try:
            return await asyncio.to_thread(
                self.load_text, model.path, model.max_context, model.tool_dialect
            )
        except Unavailable:
            raise
        except QuantdError as error:
            raise Unavailable(f"the tokenizer of model {model.name!r}: {error}") from error
        except Exception as error:
            _log.exception("loading a tokenizer failed", model=model.name)
            reason = f"the tokenizer of model {model.name!r}: {type(error).__name__}: {error}"
            raise Unavailable(reason) from error


async def _discard(worker: asyncio.Future[LoadedExecutor]) -> None:
    """Ends a worker that is loading, or that finished just now."""
    worker.cancel()
    await asyncio.wait([worker])
    if not worker.cancelled() and worker.exception() is None:
        await worker.result().close()


def _scheduler(info: ModelInfo, model: ModelSettings, settings: SchedulerSettings) -> Scheduler:
    pooling = info.pooling
    whole = pooling is not None and pooling.whole
    shares = model.prefix_cache and not whole
    tables = BlockTables(_cache(info, model, shares), info.kv_revision, shares, whole)
    # A vector comes in the place of a token, and takes no place.
    most = info.max_context + (pooling is not None)
    return Scheduler(tables, settings, most, whole)


def _cache(info: ModelInfo, model: ModelSettings, shares: bool) -> KvCache:
    most = max(info.max_blocks, info.num_blocks)
    pool = BlockPool(info.num_blocks, most, info.window_share)
    host = BlockPool(info.num_host_blocks) if info.num_host_blocks else None
    # Blocks that nobody else may use are of no use later either.
    keeps = model.disk_kv_path is not None and host is not None and shares
    disk = DiskIndex(model.disk_kv_bytes) if keeps else None
    return KvCache(pool, host, disk, info.block_bytes, Window(info.window, info.window_share))


def _frame(model: ModelSettings, scheduler: SchedulerSettings) -> LoadModel:
    return LoadModel(
        name=model.name,
        path=str(model.path),
        dtype=model.dtype,
        quantization=model.quantization,
        max_context=model.max_context,
        kv_bytes=model.kv_bytes,
        kv_dtype=model.kv_dtype,
        host_kv_bytes=model.host_kv_bytes,
        disk_kv_path=None if model.disk_kv_path is None else str(model.disk_kv_path),
        disk_kv_bytes=model.disk_kv_bytes,
        load_format=model.load_format,
        device=model.device,
        threads=model.threads,
        task=model.task,
        pooling=model.pooling,
        matryoshka=model.matryoshka,
        token_budget=scheduler.token_budget,
        max_running=scheduler.max_running,
    )
