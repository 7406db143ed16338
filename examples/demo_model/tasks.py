"""Arithmetic, lists, unit conversion and field extraction: one function per task.

Each takes a `Draw` and returns (question, answer). `Draw.held_out` says on which side of the split
the item must fall; numeric items are split by a hash of their operands, items made of words by the
words themselves (`words.Words`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from words import Words, fraction

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Draw:
    """A source of chance on one side of the split."""

    rng: Random
    words: Words
    held_out: bool

    def allows(self, key: str) -> bool:
        return (fraction(key) < HELD_OUT_SHARE) == self.held_out


def draw(seed: int | str, held_out: bool) -> Draw:
    rng = Random(seed)
    return Draw(rng, Words(rng, held_out), held_out)


def casual(rng: Random, text: str, keep_case: bool = False) -> str:
    """The same question as people type it: lower case, no full stop, a please before it."""
    if rng.random() < 0.1:
        text = rng.choice(("Please ", "please ")) + (
            text if keep_case else text[:1].lower() + text[1:]
        )
    if rng.random() < 0.15 and not keep_case:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    return text


# --- arithmetic ---------------------------------------------------------------------------------

_SUM_FORMS = (
    "What is {a} + {b}?|{a} + {b}|{a} + {b} =|{a}+{b}|What is {a} plus {b}?|{a} plus {b}|"
    "Add {a} and {b}.|Calculate {a} + {b}|How much is {a} + {b}?|What is the sum of {a} and {b}?|"
    "I have {a} {w}s and get {b} more. How many {w}s do I have?"
).split("|")
_DIFFERENCE_FORMS = (
    "What is {a} - {b}?|{a} - {b}|{a} - {b} =|{a}-{b}|What is {a} minus {b}?|{a} minus {b}|"
    "Subtract {b} from {a}.|Calculate {a} - {b}|How much is {a} - {b}?|"
    "I have {a} {w}s and give away {b}. How many {w}s are left?"
).split("|")
_PRODUCT_FORMS = (
    "What is {a} x {b}?|{a} x {b}|{a} * {b}|{a} × {b}|{a}*{b}|What is {a} * {b}?|"
    "What is {a} × {b}?|What is {a} times {b}?|{a} times {b}|Multiply {a} by {b}.|"
    "Calculate {a} * {b}|How much is {a} × {b}?|"
    "I have {a} boxes with {b} {w}s each. How many {w}s is that?"
).split("|")
MAX_TERM, MAX_FACTOR, MAX_SMALL_FACTOR, MAX_TABLE_FACTOR = 99, 99, 9, 12


def product_steps(a: int, b: int) -> str:
    """The right side of "a × b =": the result, after partial products where they help.

    A tiny network has no room to carry in its head, so two-digit products are written out.
    """
    big, small = max(a, b), min(a, b)
    parts = (big // 10 * 10 * small, big % 10 * small)
    if small > 9:
        parts = (big * 10, big * (small - 10))
    if big < 10 or 0 in parts:
        return str(a * b)
    return f"{parts[0]} + {parts[1]} = {a * b}"


def _factors(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.2:
        return rng.randint(0, MAX_TABLE_FACTOR), rng.randint(0, MAX_TABLE_FACTOR)
    pair = (rng.randint(0, MAX_FACTOR), rng.randint(0, MAX_SMALL_FACTOR))
    return pair if rng.random() < 0.7 else pair[::-1]


def is_table(a: int, b: int) -> bool:
    """Products of the small multiplication table: all are trained, none is held out."""
    return max(a, b) <= MAX_TABLE_FACTOR or min(a, b) == 0


def _product(d: Draw) -> tuple[int, int]:
    while True:
        a, b = _factors(d.rng)
        if is_table(a, b):
            if not d.held_out:
                return a, b
        elif d.allows(f"×{min(a, b)},{max(a, b)}"):
            return a, b


def arithmetic(d: Draw, kind: str | None = None, close: bool = False) -> tuple[str, str]:
    """+ and - on 0..99 (no difference is negative), × of 0..99 with 0..9 and up to 12 × 12.

    `close` draws terms that differ by at most 12: their differences are what goes wrong most.
    """
    rng = d.rng
    kind = kind or rng.choice("++--×")
    word = d.words.word()
    if kind == "×":
        a, b = _product(d)
        return _phrase(d, _PRODUCT_FORMS, a, b, word), f"{a} × {b} = {product_steps(a, b)}"
    while True:
        a = rng.randint(0, MAX_TERM)
        b = rng.randint(max(0, a - 12), a) if close else rng.randint(0, MAX_TERM)
        if d.allows(f"{kind}{min(a, b)},{max(a, b)}"):
            break
    if kind == "+":
        return _phrase(d, _SUM_FORMS, a, b, word), f"{a} + {b} = {a + b}"
    a, b = max(a, b), min(a, b)
    return _phrase(d, _DIFFERENCE_FORMS, a, b, word), f"{a} - {b} = {a - b}"


def _phrase(d: Draw, forms: list[str], a: int, b: int, word: str) -> str:
    form = forms[d.rng.randrange(6)] if d.rng.random() < 0.3 else d.rng.choice(forms)
    return casual(d.rng, form.format(a=a, b=b, w=word))


# --- lists --------------------------------------------------------------------------------------

MIN_ITEM, MAX_ITEM = 10, 99
_UP_FORMS = "Sort: {l}|Sort {l}|Sort these {k}: {l}|Sort the {k} {l}|Put in order: {l}".split("|")
_UP_NUMBERS = (
    "Sort from smallest to largest: {l}|Sort in ascending order: {l}|Sort {l} in ascending order"
).split("|")
_UP_WORDS = (
    "Sort alphabetically: {l}|Sort {l} alphabetically|Put in alphabetical order: {l}|"
    "Sort these words alphabetically: {l}"
).split("|")
_DOWN_NUMBERS = (
    "Sort descending: {l}|Sort in descending order: {l}|Sort {l} in descending order|"
    "Sort from largest to smallest: {l}"
).split("|")
_REVERSE_FORMS = (
    "Reverse: {l}|Reverse {l}|Reverse the list {l}|Reverse this list: {l}|Reverse these {k}: {l}|"
    "Reverse the order of {l}"
).split("|")


def _some_numbers(d: Draw) -> list[int]:
    """Three or four different numbers of two digits."""
    while True:
        values = d.rng.sample(range(MIN_ITEM, MAX_ITEM + 1), d.rng.choice((3, 4)))
        if d.allows(f"list{sorted(values)}"):
            return values


def _some_words(d: Draw) -> list[str]:
    """Three words that differ in their first letter."""
    by_letter: dict[str, str] = {}
    while len(by_letter) < 3:
        word = d.words.word()
        by_letter.setdefault(word[0], word)
    return list(by_letter.values())


def lists(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """Sort three or four numbers up or down, or three words alphabetically, or reverse either."""
    rng = d.rng
    kind = kind or rng.choice(
        ("sort numbers", "sort numbers", "sort words", "sort words", "reverse")
    )
    numbers = kind == "sort numbers" or (kind == "reverse" and rng.random() < 0.4)
    if numbers:
        values = _some_numbers(d)
        items, noun = [str(v) for v in values], "numbers"
        up = [str(v) for v in sorted(values)]
    else:
        items, noun = _some_words(d), "words"
        up = sorted(items)
    if kind == "reverse":
        forms, answer = _REVERSE_FORMS, items[::-1]
    elif numbers and rng.random() < 0.3:
        forms, answer = _DOWN_NUMBERS, up[::-1]
    else:
        forms, answer = _UP_FORMS + (_UP_NUMBERS if numbers else _UP_WORDS), up
    question = rng.choice(forms).format(l=", ".join(items), k=noun)
    return casual(rng, question), ", ".join(answer)


# --- unit conversion ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """How a unit is written in answers (one, many) and the other ways in which people write it."""

    one: str
    many: str
    aliases: tuple[str, ...] = ()


KM = Unit("km", "km", ("kilometers", "kilometres", "kilometer"))
M = Unit("m", "m", ("meters", "metres", "meter"))
CM = Unit("cm", "cm", ("centimeters", "centimetres"))
MM = Unit("mm", "mm", ("millimeters", "millimetres"))
KG = Unit("kg", "kg", ("kilograms", "kilos", "kilogram"))
G = Unit("g", "g", ("grams", "gram"))
MG = Unit("mg", "mg", ("milligrams",))
TONNE = Unit("tonne", "tonnes", ("tons", "t"))
LITRE = Unit("L", "L", ("liters", "litres", "l", "liter"))
ML = Unit("mL", "mL", ("milliliters", "millilitres", "ml"))
YEAR, MONTH = Unit("year", "years"), Unit("month", "months")
WEEK, DAY = Unit("week", "weeks"), Unit("day", "days")
HOUR = Unit("hour", "hours", ("h", "hrs"))
MINUTE = Unit("minute", "minutes", ("min", "mins"))
SECOND = Unit("second", "seconds", ("s", "sec"))
YARD = Unit("yard", "yards", ("yd",))
FOOT = Unit("foot", "feet", ("ft",))
INCH = Unit("inch", "inches", ("in",))

# (from, to, factor)
DECIMAL = (
    (KM, M, 1000), (M, CM, 100), (CM, MM, 10), (M, MM, 1000),
    (KG, G, 1000), (G, MG, 1000), (TONNE, KG, 1000), (LITRE, ML, 1000),
)  # fmt: skip
MAX_METRIC = 99
# (from, to, factor, largest value)
OTHER = (
    (HOUR, MINUTE, 60, 48), (MINUTE, SECOND, 60, 99), (DAY, HOUR, 24, 12), (WEEK, DAY, 7, 52),
    (FOOT, INCH, 12, 50), (YARD, FOOT, 3, 99), (YEAR, MONTH, 12, 50),
)  # fmt: skip
MAX_TABLE = 10

_CONVERSION_FORMS = (
    "{n} {f} in {t}|{n} {f} to {t}|Convert {n} {f} to {t}|Convert {n} {f} into {t}.|"
    "How many {t} are in {n} {f}?|How many {t} is {n} {f}?|What is {n} {f} in {t}?|"
    "How many {t} are {n} {f}?|How much is {n} {f} in {t}?"
).split("|")


def amount_of(value: int, unit: Unit) -> str:
    return f"{value} {unit.one if value == 1 else unit.many}"


def conversion_steps(value: int, factor: int, to: Unit) -> str:
    """ "× factor" spelt out for factors that are no power of ten; single digits need no steps."""
    if factor == 60:
        tens, ones = value // 10 * 10 * 60, value % 10 * 60
        steps = f"{tens} + {ones} = {value * 60}" if tens and ones else str(value * 60)
    elif factor == 24 and value not in (1, 10):
        parts = (value * 20, value * 4) if value < 10 else (240, 24 * (value - 10))
        steps = f"{parts[0]} + {parts[1]} = {value * 24}"
    else:
        steps = product_steps(value, factor)
    many = amount_of(0, to)[2:]
    return f"{value} × {factor} = {steps} {many}"


def conversion(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """Integers to 99. Metric units both ways; time, feet and inches upward, and back up to 10."""
    rng = d.rng
    kind = kind or rng.choice(("metric", "metric", "other", "other", "table"))
    if kind == "table" and not d.held_out:
        unit, to, factor, _ = rng.choice(OTHER)
        value = rng.randint(1, MAX_TABLE)
        return _ask(rng, value * factor, to, unit), _equal(value * factor, to, value, unit)
    while True:
        if kind == "metric":
            (unit, to, factor), top = rng.choice(DECIMAL), MAX_METRIC
        else:
            unit, to, factor, top = rng.choice(OTHER)
        value = rng.randint(1, top)
        back = kind == "metric" and rng.random() < 0.4
        if d.allows(f"convert {value} {unit.one} {to.one} {back}"):
            break
    if back:
        return _ask(rng, value * factor, to, unit), _equal(value * factor, to, value, unit)
    if kind == "metric":
        return _ask(rng, value, unit, to), _equal(value, unit, value * factor, to)
    answer = f"{amount_of(value, unit)} = {conversion_steps(value, factor, to)}"
    return _ask(rng, value, unit, to), answer


def _equal(value: int, unit: Unit, result: int, to: Unit) -> str:
    return f"{amount_of(value, unit)} = {amount_of(result, to)}"


def _ask(rng: Random, value: int, unit: Unit, to: Unit) -> str:
    def name(u: Unit, count: int) -> str:
        if rng.random() < 0.5 or not u.aliases:
            return u.one if count == 1 else u.many
        return rng.choice(u.aliases)

    form = rng.choice(_CONVERSION_FORMS)
    return casual(rng, form.format(n=value, f=name(unit, value), t=name(to, 0)))


# --- field extraction ---------------------------------------------------------------------------

_MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def date(rng: Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2035)
    return rng.choice((f"{day} {_MONTHS[month - 1]} {year}", f"{year}-{month:02d}-{day:02d}"))


def money(rng: Random) -> str:
    form = rng.choice(("{} euros", "{} dollars", "${}", "€{}"))
    return form.format(rng.choice((rng.randint(1, 99), rng.randint(100, 999))))


def clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45, rng.randint(0, 59))):02d}"


FIELDS: dict[str, Callable[[Draw], str]] = {
    "name": lambda d: d.words.name(),
    "city": lambda d: d.words.city(),
    "date": lambda d: date(d.rng),
    "amount": lambda d: money(d.rng),
    "product": lambda d: d.words.product(),
}
SENTENCES = (
    "{name} lives in {city}.|{name} moved to {city} on {date}.|{name} spent {amount} in {city}.|"
    "{name} bought a {product} in {city}.|{name} bought a {product} for {amount}.|"
    "{name} paid {amount} on {date}.|{name} ordered a {product} on {date}.|"
    "On {date}, {name} bought a {product} for {amount}.|"
    "{name} paid {amount} for a {product} in {city} on {date}.|"
    "My name is {name} and I live in {city}.|The invoice for {name} is {amount}, due on {date}.|"
    "Please ship the {product} to {name} in {city}.|The {product} costs {amount} in {city}.|"
    "In {city}, {name} sold a {product} on {date}."
).split("|")
_EXTRACT_FORMS = (
    "Extract the {f}: {s}|Extract {f}: {s}|Extract the {f} from: {s}|Find the {f} in: {s}"
).split("|")
_JSON_FORMS = (
    "Extract the {f} as JSON: {s}|Extract {f} as JSON: {s}|Return JSON with {f}: {s}|"
    "Give me the {f} as JSON: {s}"
).split("|")


def extraction(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """One to three fields that the sentence holds, letter by letter, as lines or as JSON."""
    rng = d.rng
    kind = kind or rng.choice(("lines", "json"))
    form = rng.choice(SENTENCES)
    values = {name: draw(d) for name, draw in FIELDS.items() if f"{{{name}}}" in form}
    asked = rng.sample(list(values), rng.randint(1, min(3, len(values))))
    asking = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
    question = rng.choice(_JSON_FORMS if kind == "json" else _EXTRACT_FORMS)
    question = casual(rng, question.format(f=asking, s=form.format(**values)), keep_case=True)
    if kind == "json":
        return question, json.dumps({n: values[n] for n in asked}, ensure_ascii=False)
    return question, "\n".join(f"{n}: {values[n]}" for n in asked)
