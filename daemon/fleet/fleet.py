"""All models of this daemon: their names, who gets which, and how they come and go together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from quantd.daemon.config import ModelSettings, Settings
from quantd.daemon.engine.engine import Engine
from quantd.daemon.engine.executor import WorkerExecutor
from quantd.daemon.errors import ModelNotFound, Unavailable
from quantd.daemon.fleet.lease import Lease
from quantd.daemon.fleet.model import Model, ModelStatus, OnChange, Timing
from quantd.daemon.fleet.resident import (
    FleetMetrics,
    Loader,
    LoadText,
    StartExecutor,
)
from quantd.daemon.text import TextModel

_RETRY_SECONDS = 5.0
"""After which a daemon that shuts down may have a successor."""


class Fleet:
    """The one door to the models. Event loop only.

    `models`, `ready` and `resolve` neither wait nor wake a model.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: FleetMetrics,
        start_executor: StartExecutor = WorkerExecutor.start,
        *,
        on_change: OnChange | None = None,
        load_text: LoadText = TextModel.load,
        timing: Timing | None = None,
    ) -> None:
        """`on_change` is told of each change of a model's state and of its progress in loading."""
        self._on_change = on_change or (lambda status: None)
        self._timing = timing or Timing()
        self._loader = Loader(
            scheduler=settings.scheduler,
            metrics=metrics,
            start_executor=start_executor,
            load_text=load_text,
            clock=self._timing.clock,
        )
        self._any_model = settings.server.any_model
        self._models: dict[str, Model] = {}
        self._aliases: dict[str, str] = {}
        self._retiring: dict[asyncio.Task[None], Model] = {}
        self._draining = False
        self._adopt(settings.models)

    # --- names -------------------------------------------------------------------------------

    def resolve(self, model: str | None) -> str:
        """The model's own name for what a request calls it: a name or alias, or None for the only
        model there is. With `server.any_model` all others mean the first model.

        Raises `ModelNotFound`.
        """
        if model is not None and self.knows(model):
            return self._named(model)
        if self._models and (self._any_model or (model is None and len(self._models) == 1)):
            return next(iter(self._models))
        if model is None:
            raise ModelNotFound(f"No model is named in the request. {self._known()}", param="model")
        return self._named(model)

    def knows(self, name: str) -> bool:
        """It is a model's name or alias."""
        return name in self._models or name in self._aliases

    def _named(self, model: str) -> str:
        """The own name for a name or alias, whatever `server.any_model` says: for what is done to
        a model and not with it."""
        if not self.knows(model):
            raise ModelNotFound(
                f"The model {model!r} does not exist. {self._known()}", param="model"
            )
        return self._aliases.get(model, model)

    def _known(self) -> str:
        return f"There are: {', '.join(self._models) or 'none'}."

    # --- for requests ------------------------------------------------------------------------

    async def lease(self, model: str | None) -> Lease:
        """The right to use a model, until it is released. Waits while the model loads.

        Raises `ModelNotFound`, and `Unavailable` with the reason.
        """
        self._check_open()
        return await self._models[self.resolve(model)].lease()

    def models(self) -> list[ModelStatus]:
        """In the order of the configuration."""
        return [model.status() for model in self._models.values()]

    def loaded(self) -> list[str]:
        """The names of the models in memory."""
        return [name for name, model in self._models.items() if model.engine is not None]

    def engine_of(self, name: str) -> Engine:
        """Of a model in memory, for a look or a change that waits for nothing. Raises
        `ModelNotFound`, and `Unavailable` when it is not in memory."""
        resolved = self._named(name)
        engine = self._models[resolved].engine
        if engine is None:
            raise Unavailable(f"model {resolved!r} is not in memory")
        return engine

    def forget(self, mark: str) -> None:
        """Every model in memory gives up the cached blocks that only requests with this mark have
        used."""
        for engine in self._engines():
            engine.forget(mark)

    def unmark(self, mark: str) -> None:
        """There will be no `forget` of this mark."""
        for engine in self._engines():
            engine.unmark(mark)

    def _engines(self) -> list[Engine]:
        return [model.engine for model in self._all() if model.engine is not None]

    def ready(self) -> bool:
        """Every model that is to be preloaded has been, and none has failed."""
        return not self._draining and all(
            model.state not in ("loading", "failed")
            for model in self._models.values()
            if model.settings.preload
        )

    # --- for the administrator, and for clients that say when a model goes -------------------

    async def load(self, name: str) -> None:
        """Loads a model, also one that has failed for good. Raises as `lease`."""
        self._check_open()
        await self._models[self._named(name)].load()

    async def unload(self, name: str) -> None:
        """Ends a model when the requests that hold it have ended. Raises `ModelNotFound`."""
        await self._models[self._named(name)].unload()

    # --- for the service ---------------------------------------------------------------------

    def preload(self) -> None:
        """Begins to load the cold models that are to be preloaded, and does not wait for them."""
        _preload(self._models.values())

    def reconfigure(self, models: Mapping[str, ModelSettings]) -> None:
        """Makes these the models that there are. One that is gone ends with its last request. One
        that has to be loaded differently ends so too, and its successor is not in memory before.
        What is not changed, or only in its names and times, goes on untouched."""
        for name, model in list(self._models.items()):
            if name in models and model.update(models[name]):
                continue
            del self._models[name]
            task = asyncio.create_task(model.retire())
            self._retiring[task] = model
            task.add_done_callback(lambda task: self._retiring.pop(task))
        added = self._adopt(models)
        if not self._draining:
            _preload(added)

    async def drain(self, seconds: float) -> bool:
        """From now on `lease` raises `Unavailable`. Waits for the requests that are there, at most
        `seconds`; True when all ran to their end."""
        self._draining = True
        return all(await asyncio.gather(*(model.drain(seconds) for model in self._all())))

    async def close(self) -> None:
        """Ends all models now. Idempotent."""
        self._draining = True
        await asyncio.gather(*(model.close() for model in self._all()))
        if self._retiring:
            for task in self._retiring:
                task.cancel()
            await asyncio.wait(set(self._retiring))

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("the daemon is shutting down", retry_after=_RETRY_SECONDS)

    def _all(self) -> list[Model]:
        return [*self._models.values(), *self._retiring.values()]

    def _adopt(self, models: Mapping[str, ModelSettings]) -> list[Model]:
        """Puts the configured models in their order; returns those that are new."""
        before = self._models
        added = {name: self._new(model) for name, model in models.items() if name not in before}
        self._models = {name: before.get(name) or added[name] for name in models}
        self._aliases = {alias: name for name, model in models.items() for alias in model.aliases}
        return list(added.values())

    def _new(self, settings: ModelSettings) -> Model:
        former = {task for task, model in self._retiring.items() if model.name == settings.name}
        return Model(settings, self._loader, self._timing, self._on_change, former)


def _preload(models: Iterable[Model]) -> None:
    for model in models:
        if model.settings.preload:
            model.preload()
