"""POST /api/embed, and the older /api/embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import asker
from quantd.daemon.server.embeddings import admitted, check, embed_by, numbers
from quantd.daemon.server.models import json_response
from quantd.daemon.server.ollama.options import check_integers, context_limit, renamed
from quantd.daemon.server.ollama.run import Watch, leased, load, own_name
from quantd.daemon.server.ollama.schemas import EmbeddingsRequest, EmbedRequest
from quantd.daemon.server.schemas import EmbeddingBody

_EMBED = msgspec.json.Decoder(EmbedRequest)
_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsRequest)


async def embed(request: web.Request) -> web.Response:
    """Vectors have length 1, as Ollama's do whatever the model says; texts are cut to the context
    unless `truncate` is false."""
    sent = await read_body(request, _EMBED)
    check_integers(sent.options)
    if sent.input is None:
        raise RequestError("input: this field is required", param="input")
    who = asker(request)
    watch = Watch(who.clock)
    with renamed():
        if not sent.input:
            model, _ = await load(who, sent)
            return json_response({"model": model, "embeddings": []})
        texts: list[str | int | list[int]] = (
            [sent.input] if isinstance(sent.input, str) else [*sent.input]
        )
        wanted = check(EmbeddingBody(input=texts, dimensions=sent.dimensions))
        wanted = await admitted(who, own_name(who.fleet, sent.model), wanted)
        async with leased(who, sent, watch) as lease:
            if sent.truncate is not False:
                most = context_limit(sent.options, lease.info.max_context)
                wanted = wanted._replace(options=wanted.options._replace(most=most))
            vectors, num_tokens = await embed_by(lease, who, wanted)
    made = {
        "model": lease.name,
        "embeddings": [_unit(numbers(vector)) for vector in vectors],
        **watch.durations(),
        "prompt_eval_count": num_tokens,
    }
    return json_response(made)


async def embeddings(request: web.Request) -> web.Response:
    """One text; its vector as the model gives it."""
    sent = await read_body(request, _EMBEDDINGS)
    check_integers(sent.options)
    who = asker(request)
    with renamed():
        if not sent.prompt:
            await load(who, sent)
            return json_response({"embedding": []})
        wanted = check(EmbeddingBody(input=sent.prompt))
        wanted = await admitted(who, own_name(who.fleet, sent.model), wanted)
        async with leased(who, sent, Watch(who.clock)) as lease:
            [vector], _ = await embed_by(lease, who, wanted)
    return json_response({"embedding": numbers(vector)})


def _unit(vector: Sequence[float]) -> list[float]:
    length = max(math.sqrt(math.fsum(x * x for x in vector)), 1e-12)
    return [x / length for x in vector]
