"""/v1/files over a real socket: forms, lists, limits, owners."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from server_fakes import Served, serving

from quantd.daemon.config import StoreSettings
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.context import Clock


class Time:
    """Seconds since the epoch, as a test wants them."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.now)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def served(tmp_path: Path, time: Time) -> AsyncIterator[Served]:
    settings = StoreSettings(path=tmp_path / "state", file_bytes=100_000)
    async with serving(store=settings, clock=time.clock()) as served:
        yield served


def form(
    data: bytes = b"hello\n", purpose: str | None = "batch", name: str = "in.jsonl", **more: str
) -> aiohttp.FormData:
    made = aiohttp.FormData(quote_fields=False)
    if purpose is not None:
        made.add_field("purpose", purpose)
    made.add_field("file", data, filename=name)
    for field, value in more.items():
        made.add_field(field, value)
    return made


async def post(served: Served, data: Any, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with served.session.post("/v1/files", data=data, headers=headers) as response:
        return response.status, await response.json()


async def upload(served: Served, *args: Any, **fields: Any) -> dict[str, Any]:
    status, reply = await post(served, form(*args, **fields))
    assert status == 200, reply
    file: dict[str, Any] = reply
    return file


async def test_upload_get_content_delete(served: Served) -> None:
    file = await upload(served, b"\x00\xff" * 10_000, name="../../etc/pässwd")
    assert file == {
        "id": file["id"],
        "bytes": 20_000,
        "created_at": 1_700_000_000,
        "filename": "../../etc/pässwd",
        "purpose": "batch",
        "expires_at": 1_700_000_000 + 30 * 86400,
        "status": "processed",
        "status_details": None,
        "object": "file",
    }
    assert await served.get(f"/v1/files/{file['id']}") == (200, file)
    async with served.session.get(f"/v1/files/{file['id']}/content") as response:
        assert await response.read() == b"\x00\xff" * 10_000
    headers = {"Range": "bytes=2-5"}
    path = f"/v1/files/{file['id']}/content"
    async with served.session.get(path, headers=headers) as response:
        assert (response.status, await response.read()) == (206, b"\x00\xff\x00\xff")
    async with served.session.delete(f"/v1/files/{file['id']}") as response:
        assert await response.json() == {"id": file["id"], "object": "file", "deleted": True}
    status, reply = await served.get(f"/v1/files/{file['id']}")
    assert (status, reply["error"]["code"]) == (404, "not_found")
    assert list(served.state.store.files.folder.iterdir()) == []


async def test_the_purpose_may_come_after_the_file(served: Served) -> None:
    made = aiohttp.FormData()
    made.add_field("file", b"x", filename="a")
    made.add_field("purpose", "user_data")
    status, file = await post(served, made)
    assert (status, file["purpose"], file["expires_at"]) == (200, "user_data", None)


async def test_an_expiry_is_checked_and_kept(served: Served, time: Time) -> None:
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = await upload(served, **expiry)
    assert file["expires_at"] == 1_700_003_600
    time.now += 3600
    assert (await served.get(f"/v1/files/{file['id']}"))[0] == 404
    assert (await served.get("/v1/files"))[1]["data"] == []


@pytest.mark.parametrize(
    ("made", "param"),
    [
        (form(purpose=None), "purpose"),
        (form(purpose="batch_output"), "purpose"),
        (form(purpose="nonsense"), "purpose"),
        (form(**{"expires_after[seconds]": "10"}), "expires_after.anchor"),
        (
            form(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "10"}),
            "expires_after.seconds",
        ),
        (form(**{"expires_after[anchor]": "created_at"}), "expires_after.seconds"),
        (form(colour="blue"), "colour"),
        (form(name="x" * 600), "file name"),
    ],
)
async def test_a_wrong_field_is_named(served: Served, made: aiohttp.FormData, param: str) -> None:
    status, reply = await post(served, made)
    assert (status, reply["error"]["param"]) == (400, param)
    assert list(served.state.store.files.folder.iterdir()) == []


async def test_a_form_without_a_file(served: Served) -> None:
    made = aiohttp.FormData(default_to_multipart=True)
    made.add_field("purpose", "batch")
    status, reply = await post(served, made)
    assert (status, reply["error"]["param"]) == (400, "file")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{}", "application/json"),
        (b"no boundary here", "multipart/form-data; boundary=zzz"),
        (b"", "multipart/form-data; boundary=zzz"),
        (b"--zzz\r\n\r\n", "multipart/form-data; boundary=zzz"),
        (b"--zzz\r\n", "multipart/form-data"),
        (
            b'--zzz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
            "multipart/form-data; boundary=zzz",
        ),
    ],
)
async def test_what_is_not_a_form(served: Served, body: bytes, kind: str) -> None:
    headers = {"Content-Type": kind}
    async with served.session.post("/v1/files", data=body, headers=headers) as response:
        assert response.status == 400, await response.text()
        assert (await response.json())["error"]["type"] == "invalid_request_error"
    folder = served.state.store.database.folder / "files"
    assert not folder.exists() or list(folder.iterdir()) == []


async def test_a_file_over_the_limit(served: Served) -> None:
    status, reply = await post(served, form(b"x" * 100_001))
    assert status == 413
    assert "100000 bytes" in reply["error"]["message"]
    await upload(served, b"x" * 100_000)


async def test_a_client_that_leaves_leaves_nothing(served: Served) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'--z\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * 50_000
        raise ConnectionResetError

    headers = {"Content-Type": "multipart/form-data; boundary=z"}
    with pytest.raises((aiohttp.ClientError, ConnectionResetError)):
        async with served.session.post("/v1/files", data=slow(), headers=headers):
            pass
    await upload(served)
    folder = served.state.store.files.folder
    while len(list(folder.iterdir())) > 1:
        await served.get("/health")


async def test_lists_are_paged_and_ordered(served: Served) -> None:
    ids = [(await upload(served))["id"] for _ in range(3)]
    other = (await upload(served, purpose="user_data"))["id"]
    _, page = await served.get("/v1/files")
    assert [file["id"] for file in page["data"]] == [other, *ids[::-1]]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, other, ids[0])
    _, page = await served.get("/v1/files?purpose=batch&limit=2&order=asc")
    assert [file["id"] for file in page["data"]] == ids[:2]
    assert page["has_more"]
    _, page = await served.get(f"/v1/files?purpose=batch&limit=2&order=asc&after={ids[1]}")
    assert [file["id"] for file in page["data"]] == ids[2:]
    assert not page["has_more"]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("limit=0", 400, "limit"),
        ("limit=10001", 400, "limit"),
        ("limit=x", 400, "limit"),
        ("order=up", 400, "order"),
        ("after=file-none", 404, "after"),
    ],
)
async def test_wrong_queries(served: Served, query: str, status: int, param: str) -> None:
    got, reply = await served.get(f"/v1/files?{query}")
    assert (got, reply["error"]["param"]) == (status, param)


async def test_a_key_sees_its_own_only(tmp_path: Path) -> None:
    keys = ApiKeys([("alice", "key-a"), ("bob", "key-b")])
    async with serving(store=StoreSettings(path=tmp_path), keys=keys) as served:
        _, file = await post(served, form(), "key-a")
        bob = {"headers": {"Authorization": "Bearer key-b"}}
        alice = {"headers": {"Authorization": "Bearer key-a"}}
        for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
            assert (await served.get(path, **bob))[0] == 404
        async with served.session.delete(f"/v1/files/{file['id']}", **bob) as response:
            assert response.status == 404
        assert (await served.get("/v1/files", **bob))[1]["data"] == []
        assert (await served.get(f"/v1/files/{file['id']}", **alice))[0] == 200


async def test_where_nothing_is_kept() -> None:
    async with serving() as served:
        status, reply = await served.get("/v1/files")
        assert (status, reply["error"]["code"]) == (503, "store_unavailable")
        assert "store.path" in reply["error"]["message"]
        async with served.session.get("/v1/batches") as response:
            assert response.headers["x-should-retry"] == "false"
        assert json.dumps(await served.get("/v1/models"))


async def test_ids_lead_nowhere_else(served: Served) -> None:
    await upload(served)
    for id in ("..%2f..%2fstate.db", "..%2Fstate.db", "%2e%2e", "x%00y"):
        status, _ = await served.get(f"/v1/files/{id}/content")
        assert status in (400, 404)
