"""/v1/files. What is uploaded goes to the disk as it comes, never into memory as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError
from msgspec import Meta

from quantd.daemon.errors import RequestError
from quantd.daemon.server import limits, query
from quantd.daemon.server.context import CALLER, CONTEXT
from quantd.daemon.server.models import json_response
from quantd.daemon.server.sampling import out_of_range

if TYPE_CHECKING:
    from quantd.daemon.store import File, Store, Upload

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES = get_args(Purpose)
"""That an upload may have; those of results are made here only."""
BATCH_SECONDS = 30 * 86400
"""How long files of batches are kept unless they say otherwise; others are kept for ever."""
MAX_NAME_CHARS = 512
_MAX_FIELD_BYTES = 256
_READ_BYTES = 1 << 16


class Form(msgspec.Struct):
    """The fields of an upload; `_read_form` reads them as they come."""

    RULES: ClassVar = {"additionalProperties": False}

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Purpose
    anchor: str | msgspec.UnsetType = msgspec.field(
        name="expires_after[anchor]", default=msgspec.UNSET
    )
    """created_at."""
    seconds: Annotated[int, limits.EXPIRY_SECONDS.meta] | msgspec.UnsetType = msgspec.field(
        name="expires_after[seconds]", default=msgspec.UNSET
    )


class FileObject(msgspec.Struct):
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    status: str = "processed"
    status_details: str | None = None
    object: str = "file"


class FileList(msgspec.Struct):
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool = True


def file_object(file: File) -> FileObject:
    return FileObject(
        file.id, file.bytes, file.created_at, file.filename, file.purpose, file.expires_at
    )


async def create_file(request: web.Request) -> web.Response:
    store, now = _store(request), _now(request)
    if request.content_type != "multipart/form-data":
        raise RequestError(
            f"a file is uploaded as multipart/form-data, got {request.content_type!r}",
            code="invalid_body",
        )
    async with await store.files.begin(now) as upload:
        try:
            filename, fields = await _read_form(request, upload)
        except (ValueError, HttpProcessingError, web.RequestPayloadError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"the form cannot be read: {reason}", code="invalid_body") from None
        if filename is None:
            raise RequestError("file: this field is required", param="file")
        purpose, seconds = _purpose(fields), _lifetime(fields)
        file = await store.files.keep(upload, request[CALLER], filename, purpose, now, seconds)
    return json_response(file_object(file))


async def _read_form(request: web.Request, upload: Upload) -> tuple[str | None, dict[str, str]]:
    """The file's name and the other fields; its bytes have gone to `upload`."""
    filename: str | None = None
    fields: dict[str, str] = {}
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader):
            raise ValueError("a part that is a form itself")
        name = part.name or ""
        if name == "file":
            if filename is not None:
                raise RequestError("file: there is more than one", param="file")
            filename = part.filename or "file"
            if len(filename) > MAX_NAME_CHARS:
                limit = f"at most {MAX_NAME_CHARS} characters"
                raise out_of_range("file name", f"{len(filename)} characters", limit)
            while chunk := await part.read_chunk(_READ_BYTES):
                await upload.write(chunk)
        elif name in Form.__struct_encode_fields__:
            fields[name] = await _read_field(part)
        else:
            raise RequestError(f"the form's field {name[:64]!r} is not known", param=name[:64])
    return filename, fields


async def _read_field(part: BodyPartReader) -> str:
    text = b""
    while chunk := await part.read_chunk(_READ_BYTES):
        text += chunk
        if len(text) > _MAX_FIELD_BYTES:
            raise RequestError(
                f"{part.name} is longer than {_MAX_FIELD_BYTES} bytes", param=part.name
            )
    return text.decode("utf-8", "replace").strip()


def _purpose(fields: dict[str, str]) -> str:
    if "purpose" not in fields:
        raise RequestError("purpose: this field is required", param="purpose")
    if fields["purpose"] not in PURPOSES:
        raise out_of_range("purpose", fields["purpose"], "one of " + ", ".join(PURPOSES))
    return fields["purpose"]


def _lifetime(fields: dict[str, str]) -> int | None:
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        if "expires_after[anchor]" in fields:
            raise RequestError("expires_after.seconds is required", param="expires_after.seconds")
        return BATCH_SECONDS if fields["purpose"] == "batch" else None
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) < 12):
        raise out_of_range("expires_after.seconds", seconds, "an integer")
    return lifetime("expires_after", fields.get("expires_after[anchor]"), int(seconds))


def lifetime(name: str, anchor: str | None, seconds: int) -> int:
    """Checked seconds of an expiry policy."""
    if anchor != "created_at":
        raise out_of_range(f"{name}.anchor", anchor, "'created_at'")
    if seconds not in limits.EXPIRY_SECONDS:
        raise out_of_range(f"{name}.seconds", seconds, str(limits.EXPIRY_SECONDS))
    return seconds


async def list_files(request: web.Request) -> web.Response:
    page = await _store(request).files.page(
        request[CALLER],
        _now(request),
        purpose=request.query.get("purpose") or None,
        after=query.after(request),
        limit=query.page_limit(request, 10_000, limits.FILES_PAGE),
        descending=query.is_descending(request),
    )
    files = [file_object(file) for file in page.items]
    first, last = (files[0].id, files[-1].id) if files else (None, None)
    return json_response(FileList(files, page.has_more, first, last))


async def get_file(request: web.Request) -> web.Response:
    return json_response(file_object(await _file(request)))


async def get_content(request: web.Request) -> web.StreamResponse:
    """Streamed from the disk; `Range` is served."""
    file = await _file(request)
    headers = {"Content-Type": "application/octet-stream"}
    return web.FileResponse(_store(request).files.path(file), headers=headers)


async def delete_file(request: web.Request) -> web.Response:
    id = request.match_info["id"]
    await _store(request).files.delete(request[CALLER], id, _now(request))
    return json_response(Deleted(id, "file"))


async def _file(request: web.Request) -> File:
    files = _store(request).files
    return await files.get(request[CALLER], request.match_info["id"], _now(request))


def _store(request: web.Request) -> Store:
    return request.app[CONTEXT].state.store


def _now(request: web.Request) -> int:
    return int(request.app[CONTEXT].clock.wall())
