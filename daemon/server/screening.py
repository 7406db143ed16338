"""A request under a policy: its prompts before anything is computed, its answers as they come."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import structlog

from quantd.daemon.errors import ContentFiltered, RequestError, Unavailable
from quantd.daemon.safety.guard import Asking, Guard, GuardFailed, Verdict
from quantd.daemon.safety.normalize import normalize
from quantd.daemon.safety.policy import Policy, Stage
from quantd.daemon.safety.screen import Action, Screen
from quantd.daemon.safety.stream import StreamFilter
from quantd.daemon.server.context import Asker
from quantd.daemon.server.messages import off_loop
from quantd.daemon.server.outgoing import OutputScreen
from quantd.daemon.server.prompts import Readable

if TYPE_CHECKING:
    from quantd.daemon.fleet import Lease

S = TypeVar("S", bound=Readable)
_log = structlog.get_logger("quantd.safety")


class Text(NamedTuple):
    text: str
    is_json: bool


class Reading(NamedTuple):
    """What rules have found in the texts of one request."""

    found: Counter[str]
    blocked: str | None
    replaced: dict[Text, str]


def read(screen: Screen, texts: Sequence[Text]) -> Reading:
    """Takes its time with long texts."""
    found: Counter[str] = Counter()
    replaced: dict[Text, str] = {}
    num_chars = sum(len(text.text) for text in texts)
    for category, limit in screen.limits.items():
        if num_chars > limit:
            found[category] += 1
            if screen.actions[category] == "block":
                return Reading(found, category, replaced)
    if screen.rules is None:
        return Reading(found, None, replaced)
    alone = dataclasses.replace(screen, limits={})
    for text in texts:
        has_escapes = text.is_json and "\\" in text.text
        if not has_escapes and screen.rules.is_clean(normalize(text.text)):
            continue
        stream = StreamFilter(alone, is_json=text.is_json)
        shown = stream.feed(text.text) + stream.flush()
        found += stream.found
        if stream.blocked is not None:
            return Reading(found, stream.blocked, replaced)
        if shown != text.text:
            replaced[text] = shown
    return Reading(found, None, replaced)


class Watch:
    """On whose behalf something is watched, and where it is counted."""

    def __init__(self, asker: Asker, policy: Policy, model: str) -> None:
        """model: its own name."""
        self._asker = asker
        self.policy = policy
        self._model = model
        self._held: dict[str, Lease] = {}

    @asynccontextmanager
    async def guarding(self) -> AsyncIterator[None]:
        """The models of guards that judge the answer stay until it has ended, also while the daemon
        drains."""
        async with AsyncExitStack() as stack:
            for guard in self.policy.output.guards:
                if self._is_same(guard):
                    continue  # `lend` does it: a second lease may wait for ever
                lease = await stack.enter_async_context(guard.lease(self._asker.fleet))
                if lease is not None:
                    self._held[guard.name] = lease
            yield

    def lend(self, lease: Lease) -> None:
        """Guards that are the same model as the one that answers use its lease."""
        for guard in self.policy.output.guards:
            if self._is_same(guard):
                self._held[guard.name] = lease

    def _is_same(self, guard: Guard) -> bool:
        return self._asker.fleet.resolve(guard.settings.model) == self._model

    def count(self, stage: str, actions: Mapping[str, Action], found: Iterable[str]) -> None:
        """Once for each text or answer with these categories."""
        for category in found:
            action = actions[category]
            self._asker.context.metrics.count_safety(self.policy.name, stage, action, category)
            _log.info(
                "found",
                policy=self.policy.name,
                stage=stage,
                category=category,
                action=action,
                caller=self._asker.caller,
            )

    async def judge(self, guard: Guard, text: str, asked: str | None = None) -> Verdict | None:
        """As the function of that name."""
        return await judge(self._asker, guard, text, asked, self._held)


async def judge(
    asker: Asker,
    guard: Guard,
    text: str,
    asked: str | None = None,
    held: Mapping[str, Lease] = MappingProxyType({}),
) -> Verdict | None:
    """Of one window. None: the guard has failed, and may. Raises Unavailable where it must not."""
    now = asker.clock.monotonic()
    asking = Asking(asker.fleet, now, asker.caller, asker.is_batch, held)
    try:
        return await guard.judge(asking, text, asked)
    except GuardFailed as error:
        asker.context.metrics.count_guard_failure(guard.name)
        _log.warning("a guard has failed", guard=guard.name, reason=str(error))
        if guard.settings.on_failure == "allow":
            return None
        raise Unavailable(f"the guard {guard.name!r} has failed: {error}") from error


class Screening(Generic[S]):
    """One request. `source` is what the model shall read."""

    def __init__(self, watch: Watch, source: S) -> None:
        self.source = source
        self.prompt_filtered: dict[str, bool] = {}
        """Category that was found in the prompt → whether it was taken out."""
        self._watch = watch
        self._texts: list[Text] = []
        source.mapped(self._note)

    def _note(self, text: str, is_json: bool) -> str:
        self._texts.append(Text(text, is_json))
        return text

    @property
    def policy(self) -> Policy:
        return self._watch.policy

    def guarding(self) -> AbstractAsyncContextManager[None]:
        """Around the whole answer."""
        return self._watch.guarding()

    def lend(self, lease: Lease) -> None:
        """Of the model that answers."""
        self._watch.lend(lease)

    async def check(self, field: str) -> None:
        """Before there is a lease or a request of the engine. Raises ContentFiltered, and
        RequestError for what cannot be looked at."""
        stage = self.policy.input
        if not stage:
            return
        if not self.source.is_text:
            raise RequestError(
                f"{field} has token ids, which the policy {self.policy.name!r} cannot look at; "
                "send text",
                param=field,
            )
        found: Counter[str] = Counter()
        blocked = await self._by_rules(stage, found)
        if blocked is None:
            blocked = await self._by_guards(stage, found)
        self._watch.count("input", stage.actions, found)
        if blocked is not None:
            raise ContentFiltered(
                f"the policy {self.policy.name!r} does not let this prompt pass: it is of the "
                f"category {blocked!r}",
                param=field,
            )
        self.prompt_filtered = {name: stage.actions[name] == "redact" for name in found}

    async def _by_rules(self, stage: Stage, found: Counter[str]) -> str | None:
        screen = stage.screen
        if screen is None:
            return None
        num_chars = sum(len(text.text) for text in self._texts)
        reading = await off_loop(num_chars, lambda: read(screen, self._texts))
        found += reading.found
        if reading.blocked is None and reading.replaced:
            replaced = reading.replaced

            def change(text: str, is_json: bool) -> str:
                return replaced.get(Text(text, is_json), text)

            self.source = self.source.mapped(change)
            self._texts = [text._replace(text=change(*text)) for text in self._texts]
        return reading.blocked

    async def _by_guards(self, stage: Stage, found: Counter[str]) -> str | None:
        """One after the other, until one blocks."""
        text = self.asked()
        for guard in stage.guards:
            for window in guard.windows(text):
                verdict = await self._watch.judge(guard, window)
                for category in () if verdict is None else verdict.categories:
                    if category in stage.actions:
                        found[category] += 1
                        if stage.actions[category] == "block":
                            return category
        return None

    def asked(self) -> str:
        """The prompt as one text."""
        return "\n".join(text.text for text in self._texts)

    def output(self, takes_parts: bool, is_json: bool) -> OutputScreen | None:
        """For one choice; None when its answer is not looked at. is_json: its content has to be
        JSON."""
        if not self.policy.output:
            return None
        return OutputScreen(self._watch, self.asked, takes_parts, is_json)


async def screened(asker: Asker, model: str | None, source: S, field: str) -> Screening[S] | None:
    """What the caller's policy says of a prompt; None: no policy holds. Raises ContentFiltered,
    ModelNotFound."""
    policies = asker.state.policies
    name = asker.fleet.resolve(model)
    policy = None if policies is None else policies.of(asker.caller, name)
    if policy is None or not (policy.input or policy.output):
        return None
    screening = Screening(Watch(asker, policy, name), source)
    await screening.check(field)
    return screening
