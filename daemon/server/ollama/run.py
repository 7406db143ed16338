"""A model for one request of Ollama's: found by its name, woken, kept, and what it all took."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from quantd.daemon.errors import RequestError
from quantd.daemon.server.context import Asker, Clock
from quantd.daemon.server.generate import Generation, admitted, generation_by
from quantd.daemon.server.ollama.options import context_limit, keep_alive_seconds
from quantd.daemon.server.ollama.request import Wanted
from quantd.daemon.server.ollama.schemas import ModelRequest

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet, Lease

_TAG = ":latest"


def own_name(fleet: Fleet, name: str | None) -> str:
    """The model that is meant: "name:latest" is "name", as every name of Ollama's has a tag. Raises
    ModelNotFound."""
    if name is not None and not fleet.knows(name) and name.endswith(_TAG):
        name = name.removesuffix(_TAG)
    return fleet.resolve(name)


def tagged(name: str) -> str:
    """As Ollama would list it."""
    return name if ":" in name.rpartition("/")[2] else name + _TAG


class Watch:
    """Times of one request, from its making on; seconds of the engine's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._came = clock.monotonic()
        self._loaded = self._came

    def loaded(self) -> None:
        """The model is there."""
        self._loaded = self._clock.monotonic()

    def durations(self) -> dict[str, int]:
        """Until now; nanoseconds."""
        return {
            "total_duration": _nanoseconds(self._clock.monotonic() - self._came),
            "load_duration": _nanoseconds(self._loaded - self._came),
        }

    def measures(self, made: Generation) -> dict[str, int]:
        """Of a generation that has just ended."""
        usage = made.usage()
        choice = made.replaced.get(0, made.choices[0])
        prompt = output = 0.0
        if choice.started_at is not None and choice.first_token_at is not None:
            prompt = choice.first_token_at - choice.started_at
            output = self._clock.monotonic() - choice.first_token_at
        return {
            **self.durations(),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(prompt),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(output),
        }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


@asynccontextmanager
async def leased(asker: Asker, sent: ModelRequest, watch: Watch) -> AsyncIterator[Lease]:
    """The model that a body names, kept as long as it says. Raises RequestError for what the model
    cannot do."""
    keep, fleet = keep_alive_seconds(sent.keep_alive), asker.fleet
    async with await fleet.lease(own_name(fleet, sent.model)) as lease:
        watch.loaded()
        context_limit(sent.options, lease.info.max_context)
        if keep is not None:
            lease.keep(keep)
        yield lease


@asynccontextmanager
async def generating(asker: Asker, wanted: Wanted, watch: Watch) -> AsyncIterator[Generation]:
    """As `generation`, for a body of this API."""
    for given in wanted.options.grammars():  # before a model is loaded
        await asker.context.check_grammar(given)
    model = own_name(asker.fleet, wanted.sent.model)
    async with (
        admitted(asker, model, wanted.source, wanted.api) as prompt,
        leased(asker, wanted.sent, watch) as lease,
    ):
        if wanted.sent.think and not lease.text.format.reasons:
            raise RequestError(f"The model {lease.name!r} does not support thinking", param="think")
        running = generation_by(lease, asker, wanted.options, wanted.api, prompt)
        async with running as made:
            yield made


async def load(asker: Asker, sent: ModelRequest) -> tuple[str, str]:
    """For a body without anything to answer: the model gets loaded, or goes if `keep_alive` is 0.
    Its name and what was done, in Ollama's words."""
    watch, fleet = Watch(asker.clock), asker.fleet
    if keep_alive_seconds(sent.keep_alive) != 0:
        async with leased(asker, sent, watch) as lease:
            return lease.name, "load"
    name = own_name(fleet, sent.model)
    # One that is loading has requests that wait for it, which would fail.
    if name in fleet.loaded():
        await fleet.unload(name)
    return name, "unload"
