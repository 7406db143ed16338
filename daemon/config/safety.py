"""The settings of the safety filter: rules, guards, and policies that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from quantd.daemon.config.rules import (
    FilePath,
    Flag,
    Integer,
    OneOf,
    Seconds,
    Text,
    Texts,
    TextTable,
)

Action = Literal["off", "annotate", "redact", "block"]
CATEGORY = Text(
    pattern=r"[A-Za-z0-9][A-Za-z0-9_./-]{0,63}",
    meaning='a category: 1 to 64 letters, digits or _ . / -, like "violence" or "self-harm/intent"',
)
PII_KINDS = ("email", "phone", "iban", "card", "ip", "ssn")
_ACTIONS = TextTable(
    name=CATEGORY,
    value=OneOf(choices=("off", "annotate", "redact", "block")),
    example='{ slurs = "block", pii = "redact" }',
)
_NAMES = Texts(item=Text(meaning='a name, or with "*" and "?" several'))
_ANSWER = Text(meaning="a word as the guard writes it")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """One category that is found by rules; `name` is its table's own key."""

    name: Annotated[
        str,
        CATEGORY,
        "the category",
    ]
    words: Annotated[
        tuple[str, ...],
        Texts(item=Text(meaning="a word or phrase")),
        "whole words and phrases, whatever their case, accents and look-alikes",
    ] = ()
    words_file: Annotated[
        Path | None,
        FilePath(optional=True),
        'file with more of them, one per line, relative to this file; "": none',
    ] = None
    patterns: Annotated[
        tuple[str, ...],
        Texts(item=Text(pattern=r".+", meaning="a regular expression in RE2's syntax")),
        "regular expressions in RE2's syntax, for text in lower case",
    ] = ()
    pii: Annotated[
        tuple[str, ...],
        Texts(item=Text(pattern="|".join(PII_KINDS), meaning="one of " + ", ".join(PII_KINDS))),
        "personal data: " + ", ".join(f'"{kind}"' for kind in PII_KINDS),
    ] = ()
    max_chars: Annotated[
        int,
        Integer(low=0, high=1 << 30),
        "characters over which a text is of this category; 0: any length is fine",
    ] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """One model that judges texts; `name` is its table's own key."""

    name: Annotated[
        str,
        CATEGORY,
        "the guard's name, and the category of what it finds without a known label",
    ]
    model: Annotated[
        str,
        Text(meaning="a model's name"),
        "the model, one of [models]; its chat template makes the guard's prompt",
    ]
    prompt: Annotated[
        str,
        Text(pattern=r"|.*\{text\}.*", meaning='"", or text with {text} in it'),
        'what the guard is asked, {text} is what it judges; "": the conversation itself',
    ] = ""
    variables: Annotated[
        Mapping[str, str],
        TextTable(
            name=Text(pattern=r"[A-Za-z_][A-Za-z0-9_]*", meaning="a variable's name"),
            value=Text(),
            example='{ guideline = "No harm." }',
        ),
        "for its chat template, like ShieldGemma's guideline",
    ] = field(default_factory=dict)
    safe: Annotated[
        str,
        _ANSWER,
        "how its answer begins when it has found nothing",
    ] = "safe"
    unsafe: Annotated[
        str,
        _ANSWER,
        "how its answer begins when it has; labels may follow",
    ] = "unsafe"
    labels: Annotated[
        Mapping[str, str],
        TextTable(
            name=Text(meaning="a label"),
            value=CATEGORY,
            example='{ S1 = "violence" }',
        ),
        "its labels and their categories; without any that is known it is the guard's name",
    ] = field(default_factory=dict)
    window_chars: Annotated[
        int,
        Integer(low=64, high=1 << 20),
        "characters of an answer that are held back and judged at once",
    ] = 2000
    timeout_seconds: Annotated[
        float,
        Seconds(low=0.1, high=3600),
        "how long it may take over one judgement, loading included",
    ] = 30.0
    on_failure: Annotated[
        Literal["block", "allow"],
        OneOf(choices=("block", "allow")),
        'when it fails: "block": the request fails with 503; "allow": as if nothing was found',
    ] = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What is done about categories; `name` is its table's own key."""

    name: Annotated[
        str,
        CATEGORY,
        "the policy's name, which /v1/moderations takes for a model's",
    ]
    keys: Annotated[
        tuple[str, ...],
        _NAMES,
        'names of API keys it holds for; []: all, and who needs none is ""',
    ] = ()
    models: Annotated[
        tuple[str, ...],
        _NAMES,
        "models it holds for; []: all; the first policy of this file that holds is the one",
    ] = ()
    input: Annotated[
        Mapping[str, Action],
        _ACTIONS,
        'categories looked for in prompts: "off", "annotate", "redact" or "block"',
    ] = field(default_factory=dict)
    output: Annotated[
        Mapping[str, Action],
        _ACTIONS,
        "the same for what the model says",
    ] = field(default_factory=dict)
    reasoning: Annotated[
        bool,
        Flag(),
        "look at reasoning too",
    ] = True
    tool_calls: Annotated[
        bool,
        Flag(),
        "look at the arguments of tool calls too",
    ] = True
    pattern_chars: Annotated[
        int,
        Integer(low=8, high=2000),
        "longest match of a pattern, and how far a stream lags behind for one",
    ] = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetySettings:
    """Tables by name, in the file's order."""

    rules: Mapping[str, RuleSettings] = field(default_factory=dict)
    guards: Mapping[str, GuardSettings] = field(default_factory=dict)
    policies: Mapping[str, PolicySettings] = field(default_factory=dict)
