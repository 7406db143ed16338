"""POST /v1/rerank, /v2/rerank and /rerank, in the form of Jina and Cohere, as vLLM has it."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import Asker, asker
from quantd.daemon.server.limits import NATURAL
from quantd.daemon.server.models import json_response
from quantd.daemon.server.pooled import (
    Options,
    PooledUsage,
    Text,
    check_count,
    check_task,
    check_text,
    encoded,
    read_options,
    screened_texts,
    vectors,
)
from quantd.daemon.server.sampling import integer
from quantd.daemon.server.schemas import Document, RerankBody

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_DECODER = msgspec.json.Decoder(RerankBody)


class RerankResult(msgspec.Struct):
    index: int
    """Of the document in the request."""
    relevance_score: float
    """In [0, 1]."""
    document: Document | msgspec.UnsetType = msgspec.UNSET


class RerankReply(msgspec.Struct):
    id: str
    model: str
    results: list[RerankResult]
    """The most relevant first; equals in the request's order."""
    usage: PooledUsage


async def rerank(request: web.Request) -> web.Response:
    body = await read_body(request, _DECODER)
    return json_response(await rank(asker(request), body))


async def rank(asker: Asker, body: RerankBody) -> RerankReply:
    """Raises what the route answers with."""
    options, documents = read_options(body), _read_documents(body)
    # 0 is how vLLM's clients say "all".
    top_n = integer("top_n", body.top_n, 0, NATURAL) or len(documents)
    shows = body.return_documents is not False
    read = await screened_texts(asker, body.model, "documents", [body.query, *documents])
    query, *read_documents = [text for text in read if isinstance(text, str)]
    async with await asker.fleet.lease(body.model) as lease:
        check_task(lease, "rerank")
        encode = partial(_encode, lease.text, query, read_documents, options)
        num_chars = sum(len(body.query) + len(document) for document in documents)
        pairs = await encoded("documents", num_chars, encode)
        for index, pair in enumerate(pairs):
            check_text(f"documents[{index}]", pair.ids, lease)
        found = await vectors(asker, lease, "documents", pairs, options)
    scores: list[float] = [struct.unpack("<f", vector)[0] for vector in found]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
    num_tokens = sum(len(pair.ids) for pair in pairs)
    return RerankReply(
        id=f"rerank-{uuid.uuid4().hex}",
        model=lease.name,
        results=[
            RerankResult(i, scores[i], Document(documents[i]) if shows else msgspec.UNSET)
            for i in order
        ],
        usage=PooledUsage(num_tokens, num_tokens),
    )


def _read_documents(body: RerankBody) -> list[str]:
    check_count("documents", len(body.documents))
    if not body.query:
        raise RequestError("query is empty; at least 1 character is needed", param="query")
    documents = [item if isinstance(item, str) else item.text for item in body.documents]
    for index, document in enumerate(documents):
        if not document:
            raise RequestError(
                f"documents[{index}] is empty; at least 1 character is needed", param="documents"
            )
    return documents


def _encode(text: TextModel, query: str, documents: Sequence[str], options: Options) -> list[Text]:
    """Each document behind the query; only the document is ever cut."""
    return [Text(*text.encode_pair(query, document, options.most)) for document in documents]
