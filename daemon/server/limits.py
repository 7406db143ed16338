"""The bounds of what bodies and URLs may hold: each is read by its check and by the schema
(`schemas.py`, `openapi.py`), so that both always say the same."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from msgspec import Meta

MAX_INT = (1 << 31) - 1
"""Every integer is bounded: what travels to a worker has 64 bits."""


class Range(NamedTuple):
    """[low, high] of a number; (low, high] if `is_open`."""

    low: float
    high: float
    is_open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        return value <= self.high and (value > self.low if self.is_open else value >= self.low)

    def __str__(self) -> str:
        """As errors say it: "between 0 and 2"."""
        low, high = _shown(self.low), _shown(self.high)
        return f"above {low} and at most {high}" if self.is_open else f"between {low} and {high}"

    @property
    def meta(self) -> Meta:
        """For a type's schema. msgspec does not check it: its errors do not say the value."""
        low = "exclusiveMinimum" if self.is_open else "minimum"
        return Meta(extra_json_schema={low: self.low, "maximum": self.high})


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


class Length(NamedTuple):
    """How many characters a string has, or entries a list: [low, high]."""

    low: int
    high: int

    @property
    def chars(self) -> Meta:
        return Meta(extra_json_schema={"minLength": self.low, "maxLength": self.high})

    @property
    def items(self) -> Meta:
        return Meta(extra_json_schema={"minItems": self.low, "maxItems": self.high})


POSITIVE = Range(1, MAX_INT)
NATURAL = Range(0, MAX_INT)

TEMPERATURE = Range(0.0, 2.0)
TOP_P = Range(0.0, 1.0, is_open=True)
TOP_K = Range(-1, MAX_INT)  # -1 is vLLM's other way to say off
MIN_P = Range(0.0, 1.0)
REPETITION_PENALTY = Range(0.01, 100.0)  # beyond, float32 logits may overflow
PENALTY = Range(-2.0, 2.0)
LOGIT_BIAS = Range(-100.0, 100.0)
PRIORITY = Range(-(1 << 31), MAX_INT)
SEED = Range(-(1 << 63), (1 << 64) - 1)
TIMEOUT = Range(0.0, 86400.0, is_open=True)
LOGPROBS = Range(0, 20)
CHOICES = Range(1, 128)

STOP_STRINGS = Length(0, 64)
STOP_CHARS = Length(1, 1024)
BAD_WORDS = Length(0, 1024)
TOOLS = Length(0, 256)
TOOL_NAME = r"[A-Za-z0-9_.-]{1,128}"
CHOICE_STRINGS = 4096
TEXTS = Length(1, 2048)  # in one request, as OpenAI's
SALT_CHARS = Length(1, 256)
TOKEN_ID = r"-?[0-9]{1,10}"
REQUEST_ID = r"[A-Za-z0-9._:-]{1,128}"

PAGE = Range(1, 100)
FILES_PAGE = Range(1, 10_000)
EXPIRY_SECONDS = Range(3600, 30 * 86400)

# Of metadata
MAX_KEYS = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512
METADATA = Meta(
    extra_json_schema={
        "maxProperties": MAX_KEYS,
        "propertyNames": {"maxLength": MAX_KEY_CHARS},
        "additionalProperties": {"type": "string", "maxLength": MAX_VALUE_CHARS},
    }
)


EVENT_NUMBER = Annotated[int, Range(0, 10**11 - 1).meta]


def pattern(expression: str) -> Meta:
    """The whole string must match."""
    return Meta(extra_json_schema={"pattern": f"^{expression}$"})


def one_of(*values: object) -> Meta:
    return Meta(extra_json_schema={"enum": list(values)})


def shown_as(*types: str) -> Meta:
    """For what is decoded later: the types, "module.Name" in this package, that it may have."""
    return Meta(extra_json_schema={"x-types": list(types)})
