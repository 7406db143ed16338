"""POST /v1/moderations, in OpenAI's form: what a policy, or one guard, finds in texts."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from functools import partial

import msgspec
from aiohttp import web

from quantd.daemon.errors import ModelNotFound, RequestError
from quantd.daemon.safety.guard import Guard
from quantd.daemon.safety.policy import Policies, Stage
from quantd.daemon.safety.screen import Screen
from quantd.daemon.server.body import decode, read_body
from quantd.daemon.server.context import Asker, asker
from quantd.daemon.server.messages import off_loop
from quantd.daemon.server.models import json_response
from quantd.daemon.server.schemas import Body, ContentPart
from quantd.daemon.server.screening import Text, judge, read

MAX_INPUTS = 2048
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")
_OPENAI = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""Its SDKs read each of these."""


class ModerationBody(Body, kw_only=True):
    input: str | list[str | ContentPart] | None = None


_DECODER = msgspec.json.Decoder(ModerationBody)


class Moderation(msgspec.Struct):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    """Of rules 0 or 1; of a guard how likely it holds the text to be unsafe."""
    category_applied_input_types: dict[str, list[str]]


class ModerationReply(msgspec.Struct):
    id: str
    model: str
    results: list[Moderation]


class _Judges:
    """All that a policy looks for, or a guard."""

    def __init__(self, name: str, stages: Iterable[Stage], guards: Iterable[Guard]) -> None:
        self.name = name
        stages = list(stages)
        # What would be done does not matter, and nothing ends the search.
        self.screens = [
            Screen(dict.fromkeys(stage.actions, "annotate"), screen.rules, screen.limits)
            for stage in stages
            if (screen := stage.screen) is not None
        ]
        of_stages = [guard for stage in stages for guard in stage.guards]
        self.guards = list(dict.fromkeys([*guards, *of_stages]))
        self.categories = dict.fromkeys(_OPENAI)
        self.categories |= {name: None for stage in stages for name in stage.actions}
        self.categories |= {name: None for guard in guards for name in sorted(guard.categories)}


async def moderations(request: web.Request) -> web.Response:
    body = await read_body(request, _DECODER)
    return json_response(await _moderate(asker(request), body))


async def answer(raw: bytes, who: Asker) -> ModerationReply:
    """The answer to a body that does not come with an HTTP request of its own."""
    return await _moderate(who, decode(raw, _DECODER))


async def _moderate(who: Asker, body: ModerationBody) -> ModerationReply:
    texts = _read_input(body.input)
    judges = _chosen(who, body.model)
    results = [await _moderation(who, judges, text) for text in texts]
    return ModerationReply(f"modr-{uuid.uuid4().hex}", judges.name, results)


def check_model(who: Asker, model: str | None) -> None:
    """Raises ModelNotFound where nothing of this name, or without one, can be asked."""
    _chosen(who, model)


def _read_input(given: str | list[str | ContentPart] | None) -> list[str]:
    """Parts are one input together, as at OpenAI. Raises RequestError."""
    if given is None:
        raise RequestError(
            "input: this field is required", param="input", code="missing_required_parameter"
        )
    if isinstance(given, str):
        return [given]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise RequestError(
            f"input must have 1 to {MAX_INPUTS} entries, got {len(given)}", param="input"
        )
    texts = [item for item in given if isinstance(item, str)]
    if len(texts) == len(given):
        return texts
    parts: list[str] = []
    for index, part in enumerate(given):
        if isinstance(part, str) or part.type != "text" or part.text is None:
            kind = "a string among parts" if isinstance(part, str) else f"type {part.type!r:.80}"
            raise RequestError(
                f"input[{index}] must be a part of type 'text' with a text, got {kind}",
                param=f"input[{index}]",
            )
        parts.append(part.text)
    return ["\n".join(parts)]


def _chosen(who: Asker, model: str | None) -> _Judges:
    """A policy or a guard by its name; without one, or under OpenAI's names, the first policy that
    holds for the caller's key. Raises ModelNotFound."""
    policies = who.state.policies or Policies({}, {})
    if model is None or model.startswith(_OPENAI_MODELS):
        policy = policies.of(who.caller, None)
        if policy is None:
            raise ModelNotFound("No policy of the safety filter holds for this key.", param="model")
    else:
        policy = policies.by_name.get(model)
    if policy is not None:
        return _Judges(policy.name, (policy.input, policy.output), ())
    guard = policies.guards.get(model or "")
    if guard is None:
        known = ", ".join([*policies.by_name, *policies.guards]) or "none"
        raise ModelNotFound(
            f"There is no policy or guard {model!r:.200}. There are: {known}.", param="model"
        )
    return _Judges(guard.name, (), (guard,))


async def _moderation(who: Asker, judges: _Judges, text: str) -> Moderation:
    scores = dict.fromkeys(judges.categories, 0.0)
    found: set[str] = set()
    for screen in judges.screens:
        found |= (
            await off_loop(len(text), partial(read, screen, [Text(text, False)]))
        ).found.keys()
    scores |= dict.fromkeys(found, 1.0)
    for guard in judges.guards:
        for window in guard.windows(text):
            verdict = await judge(who, guard, window)
            if verdict is None:
                continue
            named = [name for name in verdict.categories if name in scores]
            found.update(named)
            # A guard without labels has one category, whose score is meant also when it is low.
            scored = named if guard.settings.labels else [guard.name]
            for name in scored:
                scores[name] = max(scores.get(name, 0.0), verdict.score)
    return Moderation(
        bool(found),
        {name: name in found for name in scores},
        scores,
        {name: ["text"] for name in scores},
    )
