"""Tool calling: conversations with tool schemas, the call, and an answer from the tool's result.

Two sources. Natural tools come in families that share parameters and sentences; made-up tools
combine a verb, a noun and parameters at random, and the sentence names the parameters. One name in
seven is held out. The made-up tools teach the model to read the schema and not the tool's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks import DAYS, Draw, casual, clock
from words import PIECES, fraction

Json = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its JSON type, what it means, and how values are drawn."""

    kind: str
    description: str
    value: Callable[[Draw], str | int]


def _number(low: int, high: int) -> Callable[[Draw], int]:
    return lambda d: d.rng.randint(low, high)


def _choice(text: str) -> Callable[[Draw], str]:
    options = text.split("|")
    return lambda d: d.rng.choice(options)


PARAMETERS: dict[str, Parameter] = {
    "city": Parameter("string", "a city", lambda d: d.words.city()),
    "origin": Parameter("string", "where to start", lambda d: d.words.city()),
    "destination": Parameter("string", "where to go", lambda d: d.words.city()),
    "name": Parameter("string", "a name", lambda d: d.words.first_name()),
    "recipient": Parameter("string", "who receives it", lambda d: d.words.first_name()),
    "day": Parameter("string", "the day", _choice("|".join(DAYS))),
    "time": Parameter("string", "the time", lambda d: clock(d.rng)),
    "query": Parameter("string", "what to search for", lambda d: d.words.word()),
    "title": Parameter("string", "the title", lambda d: d.words.word()),
    "topic": Parameter("string", "the topic", lambda d: d.words.word()),
    "item": Parameter("string", "the item", lambda d: d.words.word()),
    "product": Parameter("string", "the product", lambda d: d.words.product()),
    "language": Parameter("string", "the language", _choice("French|German|Spanish|Italian|Dutch")),
    "color": Parameter("string", "the color", _choice("red|blue|green|black|white|yellow|pink")),
    "room": Parameter("string", "the room", _choice("kitchen|bedroom|office|bathroom|hall|garage")),
    "count": Parameter("integer", "how many", _number(1, 99)),
    "minutes": Parameter("integer", "length in minutes", _number(1, 90)),
    "amount": Parameter("integer", "the amount", _number(1, 999)),
    "level": Parameter("integer", "level from 0 to 100", _number(0, 100)),
    "order_id": Parameter("integer", "number of the order", _number(100, 9999)),
    "guests": Parameter("integer", "number of guests", _number(1, 12)),
}


@dataclass(frozen=True)
class Tool:
    """A tool with one or two parameters, and sentences that call it; each holds all of them."""

    name: str
    description: str
    parameters: list[str]
    sentences: list[str]


@dataclass(frozen=True)
class Family:
    """Tools that differ in the thing that they are about, {t} in the sentences."""

    verb: str
    things: str
    parameters: str
    sentences: str

    def tool(self, thing: str) -> Tool:
        return Tool(
            name=f"{self.verb}_{thing.replace(' ', '_')}",
            description=f"{self.verb.capitalize()} the {thing}",
            parameters=self.parameters.split(),
            sentences=self.sentences.replace("{t}", thing).split("|"),
        )


NATURAL = (
    Family(
        "get",
        "weather|time|temperature|population|map|forecast|humidity|mayor|traffic|sunrise|"
        "air quality",
        "city",
        "What is the {t} in {city}?|{t} in {city}|Tell me the {t} in {city}.|"
        "Show the {t} of {city}.",
    ),
    Family(
        "get",
        "balance|address|email|phone|age|birthday|profile|salary|score",
        "name",
        "What is the {t} of {name}?|{t} of {name}|Tell me the {t} of {name}.|"
        "Get the {t} of {name}.",
    ),
    Family(
        "get",
        "price|stock|size|weight|rating|color|picture|recipe",
        "item",
        "What is the {t} of the {item}?|Show the {t} of the {item}.|{t} of the {item}|"
        "Tell me the {t} of the {item}.",
    ),
    Family(
        "find",
        "distance|route|fare|train|bus|flight|ferry",
        "origin destination",
        "Find the {t} from {origin} to {destination}.|"
        "What is the {t} from {origin} to {destination}?|{t} from {origin} to {destination}|"
        "Show the {t} from {origin} to {destination}.",
    ),
    Family(
        "search",
        "web|shop|library|news|archive|catalog|forum",
        "query",
        "Search the {t} for {query}.|Look for {query} in the {t}.|Find {query} in the {t}.",
    ),
    Family(
        "show",
        "order|invoice|ticket|booking|payment|parcel",
        "order_id",
        "Show the {t} {order_id}.|Where is my {t} {order_id}?|"
        "What is the status of {t} {order_id}?|Look up {t} {order_id}.",
    ),
    Family(
        "cancel",
        "order|subscription|ticket|booking|delivery|payment",
        "order_id",
        "Cancel {t} {order_id}.|Cancel my {t} {order_id}.|I want to cancel the {t} {order_id}.",
    ),
    Family(
        "start",
        "timer|pause|break|lesson|workout|countdown",
        "minutes",
        "Start a {t} of {minutes} minutes.|Set a {t} for {minutes} minutes.|"
        "I need a {t} of {minutes} minutes.|{t} {minutes} minutes",
    ),
    Family(
        "set",
        "alarm|reminder|call|meeting|visit",
        "day time",
        "Set the {t} for {day} at {time}.|I need a {t} on {day} at {time}.|"
        "Put the {t} on {day} at {time}.|{t} on {day} at {time}",
    ),
    Family(
        "book",
        "table|taxi|boat|hall|tour",
        "guests day",
        "Book a {t} for {guests} people on {day}.|I want a {t} for {guests} on {day}.|"
        "Reserve a {t} for {guests} people on {day}.",
    ),
    Family(
        "send",
        "message|email|letter|note|card|photo",
        "recipient topic",
        "Send a {t} to {recipient} about {topic}.|Write a {t} to {recipient} about {topic}.|"
        "I want to send {recipient} a {t} about {topic}.",
    ),
    Family(
        "set",
        "light|heating|volume|fan|blind",
        "room level",
        "Set the {t} in the {room} to {level}.|Turn the {t} in the {room} to {level}.|"
        "I want the {t} in the {room} at {level}.",
    ),
    Family(
        "send",
        "money|gift|voucher|refund|bonus",
        "recipient amount",
        "Send {recipient} a {t} of {amount} euros.|Send a {t} of {amount} euros to {recipient}.|"
        "Give {recipient} a {t} of {amount} euros.",
    ),
    Family(
        "translate",
        "word|title|sign|menu|label|name",
        "query language",
        "Translate the {t} {query} into {language}.|What is the {t} {query} in {language}?|"
        "Translate the {t} {query} to {language}.",
    ),
    Family(
        "fill",
        "cart|list|box|basket|wishlist|fridge",
        "count product",
        "Put {count} {product} into the {t}.|Add {count} {product} to the {t}.|"
        "I want {count} {product} in the {t}.",
    ),
)


def _is_held_out(verb: str, noun: str) -> bool:
    """One name in seven is never seen in training, whether natural or made up."""
    return fraction(f"{verb} {noun}") < 1 / 7


_VERBS = """
get find search create update delete list send add remove set check show start stop open close book
cancel order count compute fetch track assign rename move copy print scan load save
""".split()
_NOUNS = """
report file task note ticket account profile package sensor device project server record document
course playlist photo song contract payment booking meeting team member channel address table event
""".split()

_CARRIERS = (
    "{verb} the {noun} with {p}.|{verb} a {noun} with {p}.|Use {tool} with {p}.|"
    "Call {tool} with {p}."
).split("|")


def _schema(d: Draw, tool: Tool) -> Json:
    """A tool in the shape of the OpenAI API; parameters are described now and then."""
    described = d.rng.random() < 0.15
    properties: Json = {}
    for key in tool.parameters:
        properties[key] = {"type": PARAMETERS[key].kind}
        if described:
            properties[key]["description"] = PARAMETERS[key].description
    parameters: Json = {"type": "object", "properties": properties}
    if d.rng.random() < 0.7:
        parameters["required"] = tool.parameters
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


_THINGS = [thing for family in NATURAL for thing in family.things.split("|")]


def _natural(d: Draw) -> Tool:
    """A tool of a family; most of those in training are about another thing than its own.

    Else the model knows the names by heart and does not read them.
    """
    others = (lambda: d.rng.choice(_THINGS), d.words.word, lambda: d.rng.choice(PIECES or _THINGS))
    while True:
        family = d.rng.choice(NATURAL)
        thing = d.rng.choice(family.things.split("|"))
        if not d.held_out and d.rng.random() < 0.7:
            thing = d.rng.choice(others)()
        if _is_held_out(family.verb, thing) == d.held_out:
            return family.tool(thing)


def _made_up(d: Draw) -> Tool:
    """Any verb, noun and one or two parameters, with sentences that name the parameters."""
    rng = d.rng
    while True:
        verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS)
        if _is_held_out(verb, noun) == d.held_out:
            break
    name = f"{verb}_{noun}"
    keys = rng.sample(list(PARAMETERS), rng.choice((1, 2)))
    said = " and ".join(f"{key} {{{key}}}" for key in keys)
    sentences = [c.format(verb=verb, noun=noun, tool=name, p=said) for c in _CARRIERS]
    return Tool(name, f"{verb.capitalize()} a {noun}", keys, sentences)


def tool_call(d: Draw, kind: str | None = None) -> tuple[str, list[Json], Json]:
    """(question, the one or two tools on offer, the right call)."""
    rng = d.rng
    kind = kind or rng.choice(("natural", "natural", "made up"))
    tool = _natural(d) if kind == "natural" else _made_up(d)
    values = {key: PARAMETERS[key].value(d) for key in tool.parameters}
    sentence = rng.choice(tool.sentences).format(**values)
    question = casual(rng, sentence[0].upper() + sentence[1:], keep_case=True)
    tools = [_schema(d, tool)]
    if rng.random() < 0.4:
        other = _natural(d) if rng.random() < 0.5 else _made_up(d)
        if other.name != tool.name:
            tools.insert(rng.randrange(2), _schema(d, other))
    return question, tools, {"name": tool.name, "arguments": values}


_RESULT_KEYS = """
temperature wind humidity price total status balance distance duration result answer count rating
title seats gate platform city date time name owner size state rate minutes weather
""".split()
_STATES = "sunny|cloudy|rain|snow|open|closed|done|sent|confirmed|pending|ok|on time|late|booked"
_ERRORS = "not found|timeout|no such user|access denied|server is down|invalid date|no results"


def tool_result(d: Draw) -> tuple[Json, str]:
    """A tool's result and the one sentence that tells it: "The <key> is <value>" for each entry."""
    rng = d.rng
    if rng.random() < 0.08:
        error = rng.choice(_ERRORS.split("|"))
        return {"error": error}, f"The tool reported an error: {error}."
    result: Json = {key: _result_value(d) for key in rng.sample(_RESULT_KEYS, rng.choice((1, 2)))}
    text = " and ".join(f"the {key} is {value}" for key, value in result.items())
    return result, text[0].upper() + text[1:] + "."


def _result_value(d: Draw) -> str | int:
    rng = d.rng
    draws: tuple[Callable[[], str | int], ...] = (
        lambda: rng.randint(0, rng.choice((40, 999))),
        lambda: rng.choice(_STATES.split("|")),
        d.words.city,
        d.words.first_name,
        d.words.word,
        lambda: clock(rng),
        lambda: f"{rng.randint(1, 99)} {rng.choice(('km', 'euros', 'C', 'kg', 'minutes', '%'))}",
    )
    return rng.choice(draws)()
