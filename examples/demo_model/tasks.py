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
    """The same question as people type it: lower case, no full stop, a please before or after."""
    if rng.random() < 0.12:
        text = rng.choice(("Please ", "Can you ", "Could you please ", "Hi, ", "Now ", "ok, ")) + (
            text if keep_case else text[:1].lower() + text[1:]
        )
    if rng.random() < 0.25 and not keep_case:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    elif rng.random() < 0.08 and text[-1:].isalnum():
        text += rng.choice((" please", ", please", " thanks"))
    return text


# --- arithmetic ---------------------------------------------------------------------------------

_SUM_FORMS = (
    "{a} + {b}|{a}+{b}|{a} + {b} =|{a}+{b}=|{a}+{b}=?|What is {a} + {b}?|What is {a}+{b}?|"
    "What's {a} + {b}?|What is {a} plus {b}?|{a} plus {b}|Add {a} and {b}.|Add {a} to {b}.|"
    "Calculate {a} + {b}|Compute {a} + {b}.|How much is {a} + {b}?|How much is {a} plus {b}?|"
    "The sum of {a} and {b}|What is the sum of {a} and {b}?|Solve {a} + {b}|Sum {a} and {b}.|"
    "I have {a} {w}s and get {b} more. How many {w}s do I have?|Tell me {a} + {b}.|"
    "There are {a} {w}s here and {b} there. How many in total?|How many is {a} and {b} together?"
).split("|")
_DIFFERENCE_FORMS = (
    "{a} - {b}|{a}-{b}|{a} - {b} =|{a}-{b}=|{a}-{b}=?|What is {a} - {b}?|What is {a}-{b}?|"
    "What's {a} - {b}?|What is {a} minus {b}?|{a} minus {b}|Subtract {b} from {a}.|"
    "Take {b} away from {a}.|Calculate {a} - {b}|Compute {a} - {b}.|How much is {a} - {b}?|"
    "How much is {a} minus {b}?|Solve {a} - {b}|Tell me {a} - {b}.|"
    "I have {a} {w}s and give away {b}. How many {w}s are left?|"
    "There were {a} {w}s and {b} are gone. How many are left?"
).split("|")
_PRODUCT_FORMS = (
    "{a} × {b}|{a} x {b}|{a} * {b}|{a}*{b}|{a}x{b}|{a} * {b} =|{a}*{b}=?|What is {a} × {b}?|"
    "What is {a} x {b}?|What is {a} * {b}?|What is {a}*{b}?|What's {a} times {b}?|{a} times {b}|"
    "What is {a} times {b}?|Multiply {a} by {b}.|Multiply {a} and {b}.|Calculate {a} * {b}|"
    "Compute {a} × {b}.|How much is {a} × {b}?|How much is {a} times {b}?|"
    "The product of {a} and {b}|What is the product of {a} and {b}?|"
    "{a} multiplied by {b}|Solve {a} x {b}|"
    "I have {a} boxes with {b} {w}s each. How many {w}s is that?"
).split("|")
MAX_TERM, MAX_FACTOR, MAX_SMALL_FACTOR = 999, 99, 12


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


def _term(rng: Random) -> int:
    return rng.randint(0, rng.choice((20, 99, 99, 99, MAX_TERM, MAX_TERM)))


def _factors(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.2:
        return rng.randint(0, 12), rng.randint(0, 12)
    pair = (rng.randint(0, MAX_FACTOR), rng.randint(0, MAX_SMALL_FACTOR))
    return pair if rng.random() < 0.7 else pair[::-1]


def is_table(a: int, b: int) -> bool:
    """Products of the small multiplication table: all are trained, none is held out."""
    return max(a, b) <= MAX_SMALL_FACTOR or min(a, b) == 0


def _product(d: Draw) -> tuple[int, int]:
    while True:
        a, b = _factors(d.rng)
        if is_table(a, b):
            if not d.held_out:
                return a, b
        elif d.allows(f"×{min(a, b)},{max(a, b)}"):
            return a, b


def arithmetic(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """+ and - on 0..999 (a difference may be negative), × of 0..99 with 0..12."""
    rng = d.rng
    kind = kind or rng.choice("++--×")
    word = d.words.word()
    if kind == "×":
        a, b = _product(d)
        return _phrase(d, _PRODUCT_FORMS, a, b, word), f"{a} × {b} = {product_steps(a, b)}"
    while True:
        a, b = _term(rng), _term(rng)
        if d.allows(f"{kind}{min(a, b)},{max(a, b)}"):
            break
    if kind == "+":
        return _phrase(d, _SUM_FORMS, a, b, word), f"{a} + {b} = {a + b}"
    if a < b and rng.random() < 0.75:
        a, b = b, a
    return _phrase(d, _DIFFERENCE_FORMS, a, b, word), f"{a} - {b} = {a - b}"


def _phrase(d: Draw, forms: list[str], a: int, b: int, word: str) -> str:
    form = forms[d.rng.randrange(6)] if d.rng.random() < 0.3 else d.rng.choice(forms)
    return casual(d.rng, form.format(a=a, b=b, w=word))


# --- lists --------------------------------------------------------------------------------------

_UP_FORMS = (
    "Sort {k}: {l}|Sort {l}|Sort: {l}|Sort the {k} {l}|Sort these {k}: {l}|Put in order: {l}|"
    "Sort {l} in ascending order|Sort these {k} in ascending order: {l}|Order these {k}: {l}|"
    "Sort this list: {l}|Sort the list {l}|Arrange {l} in ascending order|sorted: {l}|"
    "Arrange these {k} in order: {l}|Can you sort {l}?|Put these {k} in order: {l}|"
    "Sort the following {k}: {l}|What is the sorted order of {l}?"
).split("|")
_UP_NUMBERS = (
    "Sort from smallest to largest: {l}|Sort {l} from small to large|Order {l} from low to high|"
    "Sort these numbers from smallest to largest: {l}|Put {l} in increasing order"
).split("|")
_UP_WORDS = (
    "Sort alphabetically: {l}|Sort {l} alphabetically|Put in alphabetical order: {l}|"
    "Sort these words alphabetically: {l}|Put {l} in alphabetical order|Sort from a to z: {l}"
).split("|")
_DOWN_NUMBERS = (
    "Sort descending: {l}|Sort {l} in descending order|Sort from largest to smallest: {l}|"
    "Sort {l} from large to small|Order {l} from high to low|Put {l} in decreasing order|"
    "Sort these numbers in descending order: {l}|Sort these numbers from largest to smallest: {l}"
).split("|")
_REVERSE_FORMS = (
    "Reverse: {l}|Reverse {l}|Reverse the list {l}|Reverse this list: {l}|Reverse these {k}: {l}|"
    "Reverse the order of {l}|Write {l} backwards|Give me {l} in reverse order|"
    "Put {l} in reverse order|List these {k} in reverse order: {l}|Can you reverse {l}?|"
    "Reverse the {k} {l}|reversed: {l}|What is {l} in reverse?|Turn this list around: {l}"
).split("|")


def _spell(rng: Random, items: list[str]) -> str:
    shape = rng.random()
    if shape < 0.65:
        return ", ".join(items)
    if shape < 0.8:
        return " ".join(items)
    if shape < 0.88:
        return ",".join(items)
    if shape < 0.95:
        return ", ".join(items[:-1]) + " and " + items[-1]
    return "[" + ", ".join(items) + "]"


def _some_numbers(d: Draw) -> list[int]:
    while True:
        top = d.rng.choice((20, 99, 99, 999))
        values = [d.rng.randint(0, top) for _ in range(d.rng.randint(3, 6))]
        if d.allows(f"list{sorted(values)}"):
            return values


def _some_words(d: Draw) -> list[str]:
    """Three to five words that differ in their first letter."""
    by_letter: dict[str, str] = {}
    count = d.rng.randint(3, 5)
    while len(by_letter) < count:
        word = d.words.word() if d.rng.random() < 0.85 else d.words.first_name()
        by_letter.setdefault(word[0].lower(), word)
    return list(by_letter.values())


def lists(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """Sort 3 to 6 numbers up or down, 3 to 5 words alphabetically, or reverse either."""
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
        up = sorted(items, key=str.lower)
    if kind == "reverse":
        forms, answer = _REVERSE_FORMS, items[::-1]
    elif numbers and rng.random() < 0.4:
        forms, answer = _DOWN_NUMBERS, up[::-1]
    else:
        forms, answer = _UP_FORMS + (_UP_NUMBERS if numbers else _UP_WORDS) * 2, up
    question = rng.choice(forms).format(l=_spell(rng, items), k=rng.choice((noun, "items", noun)))
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    return casual(rng, question, keep_case=True), ", ".join(answer)


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

# (from, to, factor, largest value)
DECIMAL = (
    (KM, M, 1000, 999), (M, CM, 100, 999), (CM, MM, 10, 999), (M, MM, 1000, 99),
    (KG, G, 1000, 999), (G, MG, 1000, 99), (TONNE, KG, 1000, 99), (LITRE, ML, 1000, 99),
)  # fmt: skip
OTHER = (
    (HOUR, MINUTE, 60, 48), (MINUTE, SECOND, 60, 99), (DAY, HOUR, 24, 12), (WEEK, DAY, 7, 52),
    (FOOT, INCH, 12, 50), (YARD, FOOT, 3, 99), (YEAR, MONTH, 12, 50),
)  # fmt: skip
MAX_TABLE = 10

_CONVERSION_FORMS = (
    "{n} {f} in {t}|{n} {f} to {t}|{n}{f} to {t}|{n} {f} = ? {t}|Convert {n} {f} to {t}|"
    "Convert {n} {f} into {t}.|How many {t} are in {n} {f}?|How many {t} is {n} {f}?|"
    "What is {n} {f} in {t}?|How many {t} are {n} {f}?|Express {n} {f} in {t}.|{n} {f} as {t}|"
    "How much is {n} {f} in {t}?|How many {t} in {n} {f}?|Change {n} {f} to {t}.|"
    "I need {n} {f} in {t}.|How many {t} make {n} {f}?|Turn {n} {f} into {t}."
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
    """Integers only. Metric units both ways; time, feet and inches upward, and back up to 10."""
    rng = d.rng
    kind = kind or rng.choice(("metric", "metric", "other", "other", "table"))
    if kind == "table" and not d.held_out:
        unit, to, factor, _ = rng.choice(OTHER)
        value = rng.randint(1, MAX_TABLE)
        return _ask(rng, value * factor, to, unit), _equal(value * factor, to, value, unit)
    while True:
        unit, to, factor, top = rng.choice(DECIMAL if kind == "metric" else OTHER)
        value = rng.randint(1, top if rng.random() < 0.5 else min(top, 99))
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
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def date(rng: Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2035)
    name = _MONTHS[month - 1]
    return rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}",
            f"{day} {name}",
            f"{name} {day}, {year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}/{month:02d}/{year}",
            rng.choice(_DAYS),
        )
    )


def money(rng: Random) -> str:
    value = rng.choice((rng.randint(1, 99), rng.randint(100, 999), rng.randint(1, 50) * 100))
    cents = f".{rng.randint(1, 99):02d}" if rng.random() < 0.2 else ""
    form = rng.choice(
        ("{} euros", "{} dollars", "${}", "€{}", "{} EUR", "{} USD", "{} pounds", "£{}")
    )
    return form.format(f"{value}{cents}")


def clock(rng: Random) -> str:
    hour, minute = rng.randint(0, 23), rng.choice((0, 15, 30, 45, rng.randint(0, 59)))
    if rng.random() < 0.3:
        return f"{hour % 12 or 12} {'am' if hour < 12 else 'pm'}"
    return f"{hour:02d}:{minute:02d}"


def email(d: Draw) -> str:
    user, host = d.words.first_name().lower(), d.words.word()
    return f"{user}@{host}.{d.rng.choice(('com', 'org', 'net', 'de', 'io'))}"


def phone(rng: Random) -> str:
    return f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"


FIELDS: dict[str, Callable[[Draw], str]] = {
    "name": lambda d: d.words.name(),
    "city": lambda d: d.words.city(),
    "date": lambda d: date(d.rng),
    "amount": lambda d: money(d.rng),
    "time": lambda d: clock(d.rng),
    "product": lambda d: d.words.product(),
    "email": email,
    "phone": lambda d: phone(d.rng),
    "age": lambda d: str(d.rng.randint(18, 90)),
}
SENTENCES = (
    "{name} paid {amount} for a {product} in {city} on {date}.|{name} lives in {city}.|"
    "{name} moved to {city} on {date}.|On {date}, {name} bought a {product} for {amount}.|"
    "My name is {name} and I live in {city}.|I am {name}, {age} years old, from {city}.|"
    "The invoice for {name} is {amount}, due on {date}.|{name} from {city} ordered a {product}.|"
    "Please ship the {product} to {name} in {city} by {date}.|{name} ({age}) works in {city}.|"
    "We received {amount} from {name} on {date}.|The meeting with {name} is on {date} at {time}.|"
    "{name} arrives in {city} at {time} on {date}.|Call {name} at {phone}.|"
    "Write to {name} at {email} before {date}.|{name}'s email is {email} and the phone is {phone}.|"
    "A {product} was sold to {name} for {amount}.|{name} sent {amount} to a friend in {city}.|"
    "The train to {city} leaves at {time} on {date}.|You can reach {name} in {city} at {phone}.|"
    "{name} is {age} and was born in {city}.|"
    "The concert in {city} is on {date} and costs {amount}.|"
    "Hello, this is {name} from {city}, my number is {phone}.|"
    "Order: {product}, {amount}, {city}.|"
    "{name} will fly to {city} on {date} for {amount}.|Dinner with {name} at {time} in {city}.|"
    "In {city}, {name} sold a {product} on {date}.|{name} spent {amount} in {city}.|"
    "The {product} costs {amount}.|Yesterday {name} met us in {city} at {time}.|"
    "Send the {product} to {email}, it costs {amount}.|{name} turned {age} on {date}.|"
    "Hi, I am {name}. I want to return the {product} I bought on {date}.|"
    "{name} booked a room in {city} from {date} for {amount}."
).split("|")
_EXTRACT_FORMS = (
    "Extract the {f}: {s}|Extract {f}: {s}|Extract {f} from: {s}|Extract the {f} from this: {s}|"
    'Extract the {f} from "{s}"|Get the {f} from this sentence: {s}|Find the {f} in: {s}|'
    "{s}\nExtract the {f}.|{s}\nGive me the {f}.|{s} Extract {f}.|{f}? {s}|Find {f}: {s}|"
    "From the sentence, extract {f}: {s}|Pull out the {f}: {s}|Which {f} does this mention? {s}|"
    'What is the {f} in "{s}"?|List the {f} in this text: {s}|Read this and give the {f}: {s}'
).split("|")
_JSON_FORMS = (
    "Extract the {f} as JSON: {s}|Extract {f} as JSON: {s}|Extract {f} as json from: {s}|"
    "Return JSON with {f}: {s}|Give me the {f} as JSON: {s}|{s}\nExtract the {f} as JSON.|"
    "JSON with {f}: {s}|Extract the {f} from this sentence in JSON: {s}|"
    "Turn this into JSON with {f}: {s}|{s}\nReturn {f} as JSON.|Write {f} as a JSON object: {s}|"
    "Parse {f} into JSON: {s}|Make a small JSON with the {f} from: {s}"
).split("|")
_ALL_FIELDS = ("fields", "fields", "data")


def _and(rng: Random, names: list[str]) -> str:
    if len(names) > 1 and rng.random() < 0.7:
        return ", ".join(names[:-1]) + " and " + names[-1]
    return ", ".join(names)


def extraction(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """Fields that the sentence holds, copied letter by letter, as lines or as a JSON object.

    A field that is asked for and is not there is answered "not given", or null in JSON.
    """
    rng = d.rng
    kind = kind or rng.choice(("lines", "json"))
    form = rng.choice(SENTENCES)
    present = sorted(
        (n for n in FIELDS if f"{{{n}}}" in form), key=lambda n: form.index(f"{{{n}}}")
    )
    values = {name: FIELDS[name](d) for name in present}
    sentence = form.format(**values)
    if rng.random() < 0.15:
        sentence = sentence.lower()
        values = {name: value.lower() for name, value in values.items()}
    if rng.random() < 0.2:
        sentence = sentence.rstrip(".")
    asked = rng.sample(present, rng.randint(1, len(present)))
    if rng.random() < 0.06:
        asked.insert(
            rng.randrange(len(asked) + 1), rng.choice([n for n in FIELDS if n not in present])
        )
    asking = _and(rng, asked)
    if rng.random() < 0.15:
        asked, asking = present, rng.choice(_ALL_FIELDS)
    question = rng.choice(_JSON_FORMS if kind == "json" else _EXTRACT_FORMS)
    question = casual(rng, question.format(f=asking, s=sentence), keep_case=True)
    if kind == "json":
        return question, json.dumps({n: values.get(n) for n in asked}, ensure_ascii=False)
    return question, "\n".join(f"{n}: {values.get(n, 'not given')}" for n in asked)
