"""Calls that nothing has held to be valid: with `"strict": false` a model writes them freely.

An answer with a call that cannot be read, of a function that there is not, or with arguments that
are no JSON object, is made again, once, under a grammar; so the second one has none, unless it is
cut off. A stream shows what comes, and nothing is made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantd.daemon.errors import QuantdError
from quantd.daemon.server.choice import Delta, is_object
from quantd.daemon.server.generate import Generation, collect
from quantd.daemon.text.answer import whole

if TYPE_CHECKING:
    from quantd.daemon.telemetry.metrics import Metrics


async def collect_valid(made: Generation, metrics: Metrics) -> list[Delta]:
    """`collect`, and again for what was not valid. The tokens of both count."""
    results = await collect(made)
    tools = made.options.tools
    if tools is None or not tools.toolset.is_free:
        return results
    for index, result in enumerate(results):
        if result.finish_reason in ("length", "content_filter") or is_valid(made, result):
            continue
        try:
            choice = await made.again(index)
        except QuantdError:  # no grammar for this tokenizer, a full queue: the first one will do
            continue
        metrics.engine(made.model).tool_call_retries += 1
        results[index] = Delta(index)
        while choice.finish_reason is None:
            results[index].add(await choice.next())
    return results


def is_valid(made: Generation, result: Delta) -> bool:
    if made.choices[result.index].num_failed_calls:
        return False
    calls = whole(result.parts).calls
    if calls and result.finish_reason == "stop":
        return True  # the caller's stop string has cut the last one off
    return all(is_object(call.arguments) for call in calls)
