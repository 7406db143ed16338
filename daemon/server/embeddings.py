"""POST /v1/embeddings, in OpenAI's form."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import decode, read_body
from quantd.daemon.server.context import Asker, asker
from quantd.daemon.server.limits import POSITIVE
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
from quantd.daemon.server.sampling import integer, out_of_range
from quantd.daemon.server.schemas import EmbeddingBody
from quantd.daemon.types import Pooling

if TYPE_CHECKING:
    from quantd.daemon.fleet import Lease
    from quantd.daemon.text import TextModel

_DECODER = msgspec.json.Decoder(EmbeddingBody)
_FORMATS = ("float", "base64")


class EmbeddingObject(msgspec.Struct):
    index: int
    embedding: Sequence[float] | str
    """Base64: of little-endian float32."""
    object: str = "embedding"


class EmbeddingReply(msgspec.Struct):
    model: str
    data: list[EmbeddingObject]
    usage: PooledUsage
    object: str = "list"


async def embeddings(request: web.Request) -> web.Response:
    body = await read_body(request, _DECODER)
    return json_response(await embed(asker(request), body))


async def answer(raw: bytes, asker: Asker) -> EmbeddingReply:
    """The answer to a body that does not come with an HTTP request of its own."""
    return await embed(asker, decode(raw, _DECODER))


async def embed(asker: Asker, body: EmbeddingBody) -> EmbeddingReply:
    """Raises what the route answers with."""
    wanted = await admitted(asker, body.model, check(body))
    async with await asker.fleet.lease(body.model) as lease:
        made, num_tokens = await embed_by(lease, asker, wanted)
    encoding = body.encoding_format or "float"
    return EmbeddingReply(
        model=lease.name,
        data=[EmbeddingObject(i, _written(vector, encoding)) for i, vector in enumerate(made)],
        usage=PooledUsage(num_tokens, num_tokens),
    )


class Wanted(NamedTuple):
    """A checked body."""

    body: EmbeddingBody
    options: Options
    texts: Sequence[str | list[int]]
    dimensions: int | None


def check(body: EmbeddingBody) -> Wanted:
    """Raises RequestError; needs no model."""
    options, texts = read_options(body), _read_input(body.input)
    encoding = body.encoding_format or "float"
    if encoding not in _FORMATS:
        raise out_of_range("encoding_format", encoding, "float or base64")
    asked = body.dimensions
    size = None if asked is None else integer("dimensions", asked, 0, POSITIVE)
    return Wanted(body, options, texts, size)


async def admitted(asker: Asker, model: str | None, wanted: Wanted) -> Wanted:
    """As the caller's policy lets the model read it; to be asked before a lease. Raises
    ContentFiltered, ModelNotFound."""
    texts = await screened_texts(asker, model, "input", wanted.texts)
    return wanted._replace(texts=texts)


async def embed_by(lease: Lease, asker: Asker, wanted: Wanted) -> tuple[list[bytes], int]:
    """A vector of little-endian float32 for each text, in order, and how many tokens they have. For
    who holds the model; raises as `embed`."""
    body, texts = wanted.body, wanted.texts
    pooling = check_task(lease, "embed")
    size = pooling.size
    if wanted.dimensions is not None:
        size = _check_dimensions(wanted.dimensions, pooling)
    num_chars = sum(len(text) for text in texts if isinstance(text, str))
    special = body.add_special_tokens is not False
    encode = partial(_encode, lease.text, texts, wanted.options, special)
    prompts = await encoded("input", num_chars, encode)
    for index, ids in enumerate(prompts):
        check_text(_name(index, body.input), ids, lease)
    pieces = [Text(ids) for ids in prompts]
    found = await vectors(asker, lease, "input", pieces, wanted.options)
    return [_cut(vector, size, pooling) for vector in found], sum(map(len, prompts))


def _read_input(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One entry per text. Raises RequestError for what is neither of OpenAI's four forms."""
    if isinstance(given, str):
        texts: list[str | list[int]] = [given]
    else:
        texts = [item for item in given if isinstance(item, str)]
        ids = [item for item in given if isinstance(item, int)]
        lists = [item for item in given if isinstance(item, list)]
        texts = texts or ([ids] if ids else [*lists])
        if len(given) != (len(ids) or len(texts)) or (ids and lists):
            raise RequestError(
                "input must be a string, a list of strings, a list of token ids, or a list of "
                "such lists",
                param="input",
            )
    check_count("input", len(texts))
    for index, text in enumerate(texts):
        if not text:
            name = _name(index, given)
            raise RequestError(f"{name} is empty; at least 1 token is needed", param="input")
    return texts


def _name(index: int, given: object) -> str:
    """Of one text, as the caller sees it."""
    is_one = isinstance(given, str) or (isinstance(given, list) and isinstance(given[0], int))
    return "input" if is_one else f"input[{index}]"


def _check_dimensions(wanted: int, pooling: Pooling) -> int:
    """Raises RequestError with the model's size when its vectors cannot be cut so."""
    size = pooling.size
    if wanted == size:
        return size
    if not pooling.matryoshka:
        raise RequestError(
            f"dimensions is {wanted}, but this model's embeddings have {size} and, by its "
            "config.json, do not stay meaningful when they are cut; set matryoshka = true in its "
            "configuration if they do",
            param="dimensions",
        )
    if wanted > size or (pooling.dimensions and wanted not in pooling.dimensions):
        lengths = ", ".join(map(str, pooling.dimensions))
        limit = f"one of {lengths}, or {size}" if lengths else f"between 1 and {size}"
        raise out_of_range("dimensions", wanted, limit)
    return wanted


def _encode(
    text: TextModel, texts: Sequence[str | list[int]], options: Options, special: bool
) -> list[Sequence[int]]:
    most = options.most
    found: list[Sequence[int]] = []
    for item in texts:
        if not isinstance(item, str):
            found.append(item[:most])
        elif most is None or not special:
            found.append(text.encode(item, add_special_tokens=special)[:most])
        else:
            found.append(text.encode_within(item, most))
    return found


def _cut(vector: bytes, size: int, pooling: Pooling) -> bytes:
    """The first `size` numbers, of length 1 again if they were."""
    if size == pooling.size:
        return vector
    numbers = struct.unpack(f"<{size}f", vector[: 4 * size])
    if pooling.normalized:
        length = max(math.sqrt(math.fsum(x * x for x in numbers)), 1e-12)
        numbers = tuple(x / length for x in numbers)
    return struct.pack(f"<{size}f", *numbers)


def _written(vector: bytes, encoding: str) -> Sequence[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector).decode("ascii")
    return numbers(vector)


def numbers(vector: bytes) -> Sequence[float]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)
