"""Tool calling: conversations with tool schemas, the call, and an answer from the tool's result.

Two sources. Natural tools have hand-written schemas and sentences; some of them are held out.
Made-up tools combine a verb, a noun and parameters at random, and the sentence says the values in
one of many ways; they are what teaches the model to read the schema and not the tool's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks import Draw, casual, clock, date, email
from words import fraction, made_up

Json = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its JSON type, what it means, and how values are drawn."""

    kind: str
    description: str
    value: Callable[[Draw], str | int]


def _words(d: Draw) -> str:
    return " ".join(d.words.word() for _ in range(d.rng.randint(1, 3)))


def _number(low: int, high: int) -> Callable[[Draw], int]:
    return lambda d: d.rng.randint(low, high)


def _choice(text: str) -> Callable[[Draw], str]:
    options = text.split("|")
    return lambda d: d.rng.choice(options)


PARAMETERS: dict[str, Parameter] = {
    "city": Parameter("string", "name of the city", lambda d: d.words.city()),
    "location": Parameter("string", "a city", lambda d: d.words.city()),
    "origin": Parameter("string", "where to start", lambda d: d.words.city()),
    "destination": Parameter("string", "where to go", lambda d: d.words.city()),
    "name": Parameter("string", "name of the person", lambda d: d.words.name()),
    "customer": Parameter("string", "the customer's name", lambda d: d.words.name()),
    "recipient": Parameter("string", "who receives it", lambda d: d.words.first_name()),
    "user": Parameter("string", "the user", lambda d: d.words.first_name()),
    "date": Parameter("string", "the date", lambda d: date(d.rng)),
    "day": Parameter("string", "day", lambda d: date(d.rng)),
    "time": Parameter("string", "the time", lambda d: clock(d.rng)),
    "query": Parameter("string", "what to search for", _words),
    "title": Parameter("string", "the title", _words),
    "text": Parameter("string", "the text", _words),
    "message": Parameter("string", "the message to send", _words),
    "topic": Parameter("string", "the topic", lambda d: d.words.word()),
    "item": Parameter("string", "the item", lambda d: d.words.word()),
    "product": Parameter("string", "the product", lambda d: d.words.product()),
    "category": Parameter("string", "the category", lambda d: d.words.word()),
    "email": Parameter("string", "an email address", email),
    "language": Parameter("string", "the language", _choice("French|German|Spanish|Italian|Dutch")),
    "currency": Parameter("string", "the currency", _choice("EUR|USD|GBP|CHF|JPY|SEK")),
    "color": Parameter("string", "the color", _choice("red|blue|green|black|white|yellow|pink")),
    "unit": Parameter("string", "the unit", _choice("celsius|fahrenheit|kelvin")),
    "quantity": Parameter("integer", "how many", _number(1, 99)),
    "count": Parameter("integer", "number of items", _number(1, 50)),
    "limit": Parameter("integer", "maximum number of results", _number(1, 100)),
    "amount": Parameter("integer", "the amount", _number(1, 2000)),
    "price": Parameter("integer", "the price", _number(1, 999)),
    "minutes": Parameter("integer", "length in minutes", _number(1, 90)),
    "guests": Parameter("integer", "number of guests", _number(1, 12)),
    "age": Parameter("integer", "the age", _number(18, 90)),
    "level": Parameter("integer", "level from 0 to 100", _number(0, 100)),
    "order_id": Parameter("integer", "number of the order", _number(100, 99999)),
    "room": Parameter("string", "the room", _choice("kitchen|bedroom|office|bathroom|hall|garage")),
}


@dataclass(frozen=True)
class NaturalTool:
    """A tool with sentences that call it; a sentence leaves out parameters that are optional."""

    name: str
    description: str
    parameters: str
    sentences: str


NATURAL = (
    NaturalTool("get_weather", "Get the weather for a city", "city",
        "What is the weather in {city}?|How is the weather in {city} today?|weather {city}|"
        "Is it raining in {city}?|Tell me the weather in {city}.|"
        "What's the weather like in {city}?"),
    NaturalTool("get_forecast", "Weather forecast for a place and a day", "location date",
        "What will the weather be in {location} on {date}?|Forecast for {location} on {date}|"
        "What is the forecast for {location} on {date}?"),
    NaturalTool("get_temperature", "Current temperature", "city unit",
        "What is the temperature in {city} in {unit}?|How warm is it in {city} in {unit}?|"
        "Give me the temperature in {city} in {unit}.|How cold is it in {city}?"),
    NaturalTool("get_time", "Current local time in a city", "city",
        "What time is it in {city}?|Tell me the time in {city}.|current time in {city}"),
    NaturalTool("search_web", "Search the web", "query limit",
        "Search the web for {query}.|Search for {query}|Find {limit} pages about {query}.|"
        "Look up {query}.|Search the web for {query} and show {limit} results."),
    NaturalTool("search_products", "Search the shop", "query color",
        "Find a {color} {query} in the shop.|Search the shop for {query}.|"
        "Do you have a {query} in {color}?|Show me products for {query}."),
    NaturalTool("book_flight", "Book a flight", "origin destination date",
        "Book a flight from {origin} to {destination} on {date}.|I want to fly from {origin} to "
        "{destination} on {date}.|Fly me to {destination} from {origin} on {date}."),
    NaturalTool("find_trains", "Find train connections", "origin destination time",
        "Find trains from {origin} to {destination} at {time}.|Is there a train from {origin} to "
        "{destination} at {time}?|Trains from {origin} to {destination}"),
    NaturalTool("book_hotel", "Book a hotel room", "city date guests",
        "Book a hotel in {city} for {guests} guests on {date}.|I need a room in {city} on {date}.|"
        "Reserve a hotel in {city} on {date} for {guests} people."),
    NaturalTool("book_table", "Reserve a table in a restaurant", "guests time date",
        "Book a table for {guests} at {time}.|Reserve a table for {guests} on {date} at {time}.|"
        "I want a table for {guests} people at {time}."),
    NaturalTool("send_email", "Send an email", "recipient title",
        "Send an email to {recipient} with the title {title}.|Email {recipient} about {title}.|"
        "Write an email to {recipient}, title {title}."),
    NaturalTool("send_message", "Send a text message", "recipient message",
        "Send a message to {recipient}: {message}|Tell {recipient}: {message}|"
        "Message {recipient} saying {message}.|Text {recipient} {message}"),
    NaturalTool("set_timer", "Start a timer", "minutes",
        "Set a timer for {minutes} minutes.|Start a {minutes} minute timer.|timer {minutes} min|"
        "Remind me in {minutes} minutes."),
    NaturalTool("set_alarm", "Set an alarm", "time",
        "Set an alarm for {time}.|Wake me up at {time}.|alarm at {time}"),
    NaturalTool("add_event", "Add an event to the calendar", "title date time",
        "Add {title} to my calendar on {date} at {time}.|Put {title} in the calendar on {date}.|"
        "Schedule {title} on {date} at {time}."),
    NaturalTool("create_reminder", "Create a reminder", "text date",
        "Remind me of {text} on {date}.|Create a reminder for {date}: {text}|"
        "Remind me on {date} about {text}."),
    NaturalTool("translate_text", "Translate a text", "text language",
        "Translate {text} into {language}.|Translate {text} to {language}|"
        "How do you say {text} in {language}?|What is {text} in {language}?"),
    NaturalTool("convert_currency", "Convert money into a currency", "amount currency",
        "Convert {amount} to {currency}.|How much is {amount} in {currency}?|"
        "What is {amount} in {currency}?"),
    NaturalTool("get_stock_price", "Price of a stock", "name",
        "What is the stock price of {name}?|Stock price of {name}|How is the stock of {name}?"),
    NaturalTool("get_order", "Look up an order", "order_id",
        "Where is my order {order_id}?|Show order {order_id}.|What is the status of order "
        "{order_id}?|Look up order {order_id}."),
    NaturalTool("cancel_order", "Cancel an order", "order_id",
        "Cancel order {order_id}.|Please cancel my order {order_id}.|I want to cancel {order_id}."),
    NaturalTool("create_invoice", "Create an invoice", "customer amount date",
        "Create an invoice for {customer} over {amount}.|Invoice {customer} for {amount}, due "
        "{date}.|Write an invoice of {amount} for {customer} on {date}."),
    NaturalTool("transfer_money", "Transfer money", "recipient amount currency",
        "Transfer {amount} {currency} to {recipient}.|Send {amount} {currency} to {recipient}.|"
        "Send {recipient} {amount} {currency}.|Pay {recipient} {amount}."),
    NaturalTool("set_light", "Set a lamp", "room color level",
        "Turn the light in the {room} to {color}.|Set the {room} light to {level}.|"
        "Make the {room} light {color} at {level} percent."),
    NaturalTool("set_temperature", "Set the heating", "room level",
        "Set the heating in the {room} to {level}.|Heat the {room} to {level} degrees.|"
        "Set the {room} to {level} degrees."),
    NaturalTool("play_music", "Play music", "title user",
        "Play {title}.|Play {title} for {user}.|I want to hear {title}."),
    NaturalTool("add_to_cart", "Put a product into the cart", "product quantity",
        "Add {quantity} {product}s to my cart.|Put a {product} in the cart.|"
        "I want to buy {quantity} of the {product}.|Order {quantity} {product}s."),
    NaturalTool("add_contact", "Add a contact", "name email",
        "Add {name} to my contacts, email {email}.|Save the contact {name} with {email}.|"
        "New contact: {name}, {email}"),
    NaturalTool("find_recipe", "Find recipes", "item limit",
        "Find a recipe with {item}.|Show me {limit} recipes with {item}.|What can I cook with "
        "{item}?"),
    NaturalTool("get_news", "Latest news", "topic",
        "What is the news about {topic}?|News on {topic}|Show me news about {topic}.|"
        "Any news about {topic}?"),
    NaturalTool("define_word", "Look up a word in the dictionary", "text",
        "Define {text}.|What does {text} mean?|What is the meaning of {text}?"),
    NaturalTool("get_distance", "Distance between two cities", "origin destination",
        "How far is it from {origin} to {destination}?|Distance from {origin} to {destination}|"
        "How far is {destination} from {origin}?"),
    NaturalTool("create_ticket", "Open a support ticket", "title customer",
        "Open a ticket for {customer}: {title}|Create a ticket {title} for {customer}."),
    NaturalTool("find_user", "Find a user", "name",
        "Find the user {name}.|Look up {name}.|Who is {name}?|Search for the user {name}."),
)  # fmt: skip

# Natural tools that training never sees.
HELD_OUT_TOOLS = frozenset(
    "get_time find_trains set_alarm cancel_order translate_text create_invoice find_recipe".split()
)

_VERBS = """
get find search create update delete list send add remove set check show start stop open close book
cancel order count compute fetch lookup track assign rename move copy print scan load save log
""".split()
_NOUNS = """
report file task note ticket account profile package sensor device project server record document
course playlist photo song contract payment booking meeting team member channel address table event
""".split()

_CARRIERS = (
    "{verb} the {noun} with {p}.|{verb} a {noun} with {p}.|{verb} {noun}: {p}|{verb} {noun} {p}|"
    "Use {tool} with {p}.|Call {tool} with {p}.|Please {verb} the {noun}, {p}.|"
    "I want to {verb} a {noun} with {p}.|Can you {verb} the {noun} with {p}?|{tool} {p}|"
    "Run {tool}: {p}"
).split("|")
_BINDINGS = "{k} {v}|{k} {v}|{k} {v}|{k} is {v}|{k}: {v}|{k}={v}|the {k} {v}|{v} as {k}".split("|")


def _schema(d: Draw, name: str, description: str, parameters: list[tuple[str, str, str]]) -> Json:
    """A tool in the shape of the OpenAI API, with the optional parts there or not."""
    described = d.rng.random() < 0.6
    properties = {
        key: {"type": kind, "description": text} if described else {"type": kind}
        for key, kind, text in parameters
    }
    schema: Json = {"type": "object", "properties": properties}
    if d.rng.random() < 0.75:
        schema["required"] = [key for key, _, _ in parameters[: d.rng.choice((1, 9, 9))]]
    function = {"name": name, "description": description, "parameters": schema}
    if d.rng.random() < 0.12:
        del function["description"]
    return {"type": "function", "function": function}


def _natural_schema(d: Draw, tool: NaturalTool) -> Json:
    keys = [(k, PARAMETERS[k].kind, PARAMETERS[k].description) for k in tool.parameters.split()]
    return _schema(d, tool.name, tool.description, keys)


def _natural_call(d: Draw) -> tuple[str, Json, Json]:
    """(question, schema, call) for a natural tool of this side of the split."""
    tool = d.rng.choice([t for t in NATURAL if (t.name in HELD_OUT_TOOLS) == d.held_out])
    sentence = d.rng.choice(tool.sentences.split("|"))
    values = {k: PARAMETERS[k].value(d) for k in tool.parameters.split() if f"{{{k}}}" in sentence}
    question = casual(d.rng, sentence.format(**values), keep_case=True)
    return question, _natural_schema(d, tool), {"name": tool.name, "arguments": values}


def _made_up_parts(d: Draw) -> tuple[str, str, str, list[tuple[str, str, str]]]:
    """(verb, noun, tool name, parameters as key, type, description)."""
    rng = d.rng
    while True:
        verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS)
        if rng.random() < 0.2:
            noun = d.words.word()
        if (fraction(f"{verb} {noun}") < 1 / 7) == d.held_out:
            break
    name = f"{verb}_{noun}"
    if rng.random() < 0.15:
        name = rng.choice((verb + noun.capitalize(), f"{noun}_{verb}", f"{noun}.{verb}", verb))
    keys = rng.sample(list(PARAMETERS), rng.randint(1, 3))
    parameters = []
    for key in keys:
        parameter = PARAMETERS[key]
        if rng.random() < 0.3:
            new = (
                made_up(rng) if rng.random() < 0.5 else rng.choice(_NOUNS) + rng.choice(("", "_id"))
            )
            parameters.append((new, parameter.kind, f"the {new.replace('_', ' ')}"))
        else:
            parameters.append((key, parameter.kind, parameter.description))
    return verb, noun, name, parameters


def _made_up_call(d: Draw) -> tuple[str, Json, Json]:
    verb, noun, name, parameters = _made_up_parts(d)
    keys = [key for key, _, _ in parameters]
    said = keys[: d.rng.randint(1, len(keys))] if d.rng.random() < 0.2 else keys
    values: Json = {}
    for key, kind, _ in parameters:
        source = PARAMETERS.get(key)
        if source is not None:
            values[key] = source.value(d)
        else:
            values[key] = d.rng.randint(1, 9999) if kind == "integer" else _words(d)
    binding = d.rng.choice(_BINDINGS)
    phrases = [binding.format(k=k.replace("_", " ") if d.rng.random() < 0.6 else k, v=values[k])
               for k in said]  # fmt: skip
    d.rng.shuffle(phrases)
    joined = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    if d.rng.random() < 0.3:
        joined = ", ".join(phrases)
    question = d.rng.choice(_CARRIERS).format(verb=verb, noun=noun, tool=name, p=joined)
    question = casual(d.rng, question[0].upper() + question[1:], keep_case=True)
    arguments = {key: values[key] for key in keys if key in said}
    return question, _schema(d, name, f"{verb.capitalize()} a {noun}", parameters), {
        "name": name,
        "arguments": arguments,
    }  # fmt: skip


def _other_schema(d: Draw) -> Json:
    if d.rng.random() < 0.5:
        return _natural_schema(
            d, d.rng.choice([t for t in NATURAL if t.name not in HELD_OUT_TOOLS])
        )
    verb, noun, name, parameters = _made_up_parts(d)
    return _schema(d, name, f"{verb.capitalize()} a {noun}", parameters)


def tool_call(d: Draw, kind: str | None = None) -> tuple[str, list[Json], Json]:
    """(question, the tools on offer, the right call)."""
    kind = kind or d.rng.choice(("natural", "made up", "made up"))
    question, schema, call = _natural_call(d) if kind == "natural" else _made_up_call(d)
    tools = [schema]
    for _ in range(d.rng.choice((0, 0, 0, 1, 1, 2))):
        other = _other_schema(d)
        if other["function"]["name"] not in {t["function"]["name"] for t in tools}:
            tools.insert(d.rng.randrange(len(tools) + 1), other)
    return question, tools, call


_RESULT_KEYS = """
temperature condition wind humidity price total status order_id delivery_date balance distance
duration result answer count id rating title message seats available gate platform city date time
name owner size state arrival_time departure rate minutes weather
""".split()
_STATES = "sunny|cloudy|rain|snow|open|closed|done|sent|confirmed|pending|ok|on time|late|booked"
_ERRORS = "not found|timeout|no such user|access denied|server is down|invalid date|no results"


def tool_result(d: Draw) -> tuple[Json, str]:
    """A tool's result and the one sentence that tells it: "The <key> is <value>" for each entry."""
    rng = d.rng
    if rng.random() < 0.08:
        error = rng.choice(_ERRORS.split("|"))
        return {"error": error}, f"The tool reported an error: {error}."
    result: Json = {}
    for key in rng.sample(_RESULT_KEYS, rng.choice((1, 1, 2, 2, 3))):
        result[made_up(rng) if rng.random() < 0.15 else key] = _result_value(d)
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in result.items()]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return result, text[0].upper() + text[1:] + "."


def _result_value(d: Draw) -> str | int:
    rng = d.rng
    draws: tuple[Callable[[], str | int], ...] = (
        lambda: rng.randint(0, rng.choice((40, 999, 99999))),
        lambda: rng.choice(_STATES.split("|")),
        d.words.city,
        d.words.name,
        lambda: _words(d),
        lambda: date(rng),
        lambda: clock(rng),
        lambda: f"{rng.randint(1, 99)} {rng.choice(('km', 'euros', 'C', 'kg', 'minutes', '%'))}",
    )
    return rng.choice(draws)()
