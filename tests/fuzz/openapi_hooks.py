"""What schemathesis is told beside the document: which model there is, how much may be computed,
and that an error names the field."""

from __future__ import annotations

import json
from typing import Any

import schemathesis

MODEL = "demo"
MOST_TOKENS = 4
_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_REPEATS = ("n", "best_of")
NOT_OF_A_FIELD = ("invalid_json", "invalid_body", "unsupported_encoding", "nothing_to_sample")


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """A reply may have no field that is not described; of bodies that is not asked."""
    components = raw_schema["components"]["schemas"]
    bodies = reached(
        [
            operation.get("requestBody")
            for path in raw_schema["paths"].values()
            for operation in path.values()
        ],
        components,
    )
    for name in components.keys() - bodies:
        if "properties" in components[name]:
            components[name]["additionalProperties"] = False


def reached(roots: Any, components: dict[str, Any]) -> set[str]:
    """The names of all components that these lead to."""
    found: set[str] = set()
    todo = [roots]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, dict):
            todo += node.values()
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found.add(name)
                todo.append(components[name])
    return found


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Bodies that would be computed for minutes become small ones; what is wrong stays wrong."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    if _is_a_moment(body.get("keep_alive")):
        body["keep_alive"] = 60  # or each request would load the model
    for name in _TOKENS:
        if _is_above(body.get(name), MOST_TOKENS):
            body[name] = MOST_TOKENS
    for name in _REPEATS:
        if _is_above(body.get(name), 3) and body[name] <= 128:
            body[name] = 2
    return body


def _is_a_moment(value: Any) -> bool:
    """Of seconds as a number; durations as texts stay."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_above(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > most


@schemathesis.check
def names_the_field(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """A 400 about a JSON object says where in it."""
    if response.status_code != 400 or "/v1/messages" in case.path:
        return  # Anthropic's errors have no place for it but the message
    error = json.loads(response.content)["error"]
    if isinstance(error, str):
        return  # Ollama's, which are a message and no more
    is_object = isinstance(case.body, dict) and case.media_type == "application/json"
    if is_object and error["code"] not in NOT_OF_A_FIELD:
        assert error["param"], f"the error names no field: {error}"
