"""The database: what is written is there, and what goes wrong has a name and loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quantd.daemon.config import StoreSettings
from quantd.daemon.errors import (
    BodyTooLarge,
    Conflict,
    NotFound,
    StorageFull,
    StoreUnavailable,
)
from quantd.daemon.store import Batch, File, Line, Result, Store
from quantd.daemon.store.database import FILE
from quantd.daemon.store.schema import STEPS

DAY = 86400


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(StoreSettings(path=tmp_path / "state"))
    yield store
    await store.close()


async def upload(
    store: Store, data: bytes, owner: str = "a", purpose: str = "batch", seconds: int | None = None
) -> File:
    async with await store.files.begin(100) as upload:
        await upload.write(data)
        return await store.files.keep(upload, owner, "x.jsonl", purpose, 100, seconds)


def a_batch(id: str = "batch_1", file: str = "", owner: str = "a") -> Batch:
    return Batch(
        id=id,
        owner=owner,
        endpoint="/v1/completions",
        input_file_id=file,
        completion_window="24h",
        created_at=100,
        expires_at=100 + DAY,
    )


# --- the database ---------------------------------------------------------------------------------


async def test_nothing_is_opened_before_it_is_asked(tmp_path: Path) -> None:
    store = Store(StoreSettings(path=tmp_path / "state"))
    assert not store.exists()
    assert not (tmp_path / "state").exists()
    await store.close()


async def test_without_a_folder_every_call_says_so() -> None:
    store = Store(StoreSettings())
    with pytest.raises(StoreUnavailable, match=r"store\.path"):
        await store.batches.unfinished()
    await store.close()


async def test_the_folder_is_private(store: Store) -> None:
    await upload(store, b"secret")
    folder = store.database.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "files").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder / "files").iterdir())


async def test_two_daemons_do_not_share_a_folder(store: Store) -> None:
    await store.batches.unfinished()
    second = Store(StoreSettings(path=store.database.folder))
    with pytest.raises(StoreUnavailable, match="another daemon"):
        await second.batches.unfinished()
    await store.close()
    assert await second.batches.unfinished() == []
    await second.close()


async def test_a_work_that_raises_has_not_happened(store: Store) -> None:
    def work(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO events VALUES ('e', x'00', 1)")
        raise NotFound("stop")

    with pytest.raises(NotFound):
        await store.database.run(work)
    assert await store.outbox.all() == []


@pytest.mark.parametrize("damage", ["garbage", "header", "middle"])
async def test_a_damaged_database_is_set_aside_with_its_files(store: Store, damage: str) -> None:
    file = await upload(store, b"data")
    for number in range(200):
        await store.batches.add(a_batch(f"batch_{number}", file.id))
    await store.close()
    folder = store.database.folder
    data = bytearray((folder / FILE).read_bytes())
    if damage == "garbage":
        data = bytearray(b"not a database" * 1000)
    elif damage == "header":
        data[:16] = b"x" * 16
    else:
        data[4096 * 2 : 4096 * 6] = os.urandom(4096 * 4)
    (folder / FILE).write_bytes(data)
    assert await store.batches.unfinished() == []
    with pytest.raises(NotFound):
        await store.files.get("a", file.id, 100)
    assert (folder / f"{FILE}.damaged-1").read_bytes() == bytes(data)
    assert (folder / "files.damaged-1" / file.id).read_bytes() == b"data"


async def test_a_newer_version_is_not_touched(store: Store) -> None:
    await store.batches.unfinished()
    await store.close()
    path = store.database.folder / FILE
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreUnavailable, match="newer quantd"):
        await store.batches.unfinished()
    assert path.read_bytes() == before


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(StoreSettings(path=tmp_path / "file" / "state"))
    with pytest.raises(StoreUnavailable, match="file/state"):
        await store.batches.unfinished()
    await store.close()


async def test_a_full_disk_is_said_and_passes(store: Store) -> None:
    """SQLite's own bound on pages gives the same error as a full disk."""
    await store.batches.unfinished()

    def bound(pages: int | None) -> None:
        connection = store.database._connection
        assert connection is not None
        count = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {count if pages is None else pages}")

    file = await upload(store, b"data")
    bound(None)
    with pytest.raises(StorageFull, match="no room"):
        for number in range(10_000):
            await store.batches.add(a_batch(f"batch_{number}", file.id))
    bound(1_000_000)
    await store.batches.add(a_batch("batch_after", file.id))
    assert (await store.batches.get("a", "batch_after")).status == "validating"


KILLED = """
    import asyncio, os, sys
    from pathlib import Path
    from quantd.daemon.config import StoreSettings
    from quantd.daemon.store import Event, Store
    from quantd.daemon.store.outbox import put

    async def main():
        store = Store(StoreSettings(path=Path(sys.argv[1])))
        for number in range(10**6):
            await store.database.run(lambda db: put(db, Event(f"{number:06}", b"x" * 2000, number)))
            os.write(1, b"%d\\n" % number)

    asyncio.run(main())
"""


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(40):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    acknowledged = 40 + len(rest)

    async def read() -> int:
        store = Store(StoreSettings(path=tmp_path / "state"))
        events = await store.outbox.all()
        await store.close()
        assert [event.created_at for event in events] == list(range(len(events)))
        return len(events)

    assert asyncio.run(read()) in (acknowledged, acknowledged + 1)


# --- files ----------------------------------------------------------------------------------------


async def test_a_file_comes_back_as_it_was(store: Store) -> None:
    data = os.urandom(3_000_000)
    file = await upload(store, data)
    assert file.bytes == len(data)
    assert store.files.path(file).read_bytes() == data
    assert await store.files.get("a", file.id, 100) == file


async def test_others_do_not_see_it(store: Store) -> None:
    file = await upload(store, b"x", owner="a")
    for work in (store.files.get("b", file.id, 100), store.files.delete("b", file.id, 100)):
        with pytest.raises(NotFound):
            await work
    page = await store.files.page("b", 100, purpose=None, after=None, limit=10, descending=True)
    assert page.items == []
    with pytest.raises(NotFound):
        await store.batches.add(a_batch(file=file.id, owner="b"))


async def test_an_upload_that_is_given_up_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError):
        async with await store.files.begin(100) as upload:
            await upload.write(b"x" * (2 << 20))
            raise RuntimeError("the client has left")
    assert list(store.files.folder.iterdir()) == []


async def test_what_a_crash_has_left_is_swept(store: Store) -> None:
    file = await upload(store, b"kept")
    (store.files.folder / "file-abc.part").write_bytes(b"half")
    (store.files.folder / "file-def").write_bytes(b"whole, but never in the list")
    await store.close()
    assert await store.files.get("a", file.id, 100) == file
    assert [path.name for path in store.files.folder.iterdir()] == [file.id]


async def test_limits_of_one_file_and_of_all(tmp_path: Path) -> None:
    settings = StoreSettings(path=tmp_path, file_bytes=100, files_bytes=150)
    store = Store(settings)
    with pytest.raises(BodyTooLarge, match="100 bytes"):
        await upload(store, b"x" * 101)
    first = await upload(store, b"x" * 100)
    with pytest.raises(StorageFull, match="200 bytes"):
        await upload(store, b"x" * 100)
    assert [path.name for path in store.files.folder.iterdir()] == [first.id]
    await store.files.delete("a", first.id, 100)
    await upload(store, b"x" * 100)
    await store.close()


async def test_time_takes_files_away(store: Store) -> None:
    file = await upload(store, b"x" * 10, seconds=3600)
    assert file.expires_at == 3700
    await store.files.get("a", file.id, 3699)
    with pytest.raises(NotFound):
        await store.files.get("a", file.id, 3700)
    async with await store.files.begin(3700):
        pass
    assert list(store.files.folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
async def test_a_disk_that_does_not_take_a_file(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    await upload(store, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises((StorageFull, StoreUnavailable), match="state") as caught:
            await upload(store, b"x" * (2 << 20))
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert isinstance(caught.value, StorageFull) is full
    assert len(list(store.files.folder.iterdir())) == 1
    await upload(store, b"after")


async def test_a_batchs_input_stays_while_it_runs(store: Store) -> None:
    file = await upload(store, b"x", seconds=3600)
    await store.batches.add(a_batch(file=file.id))
    with pytest.raises(Conflict, match="has not ended"):
        await store.files.delete("a", file.id, 100)
    async with await store.files.begin(10_000):
        pass
    assert store.files.path(file).exists()


async def test_pages_walk_the_list_without_gaps(store: Store) -> None:
    files = [await upload(store, b"x") for _ in range(7)]
    for descending in (False, True):
        seen: list[str] = []
        after = None
        while True:
            page = await store.files.page(
                "a", 100, purpose=None, after=after, limit=3, descending=descending
            )
            seen += [file.id for file in page.items]
            if not page.has_more:
                break
            after = page.items[-1].id
        expected = [file.id for file in files]
        assert seen == (expected[::-1] if descending else expected)
    with pytest.raises(NotFound):
        await store.files.page("a", 1, purpose=None, after="file-x", limit=3, descending=True)


# --- batches --------------------------------------------------------------------------------------


async def begun(store: Store, num_lines: int) -> tuple[Batch, list[Line]]:
    file = await upload(store, b"x")
    batch = a_batch(file=file.id)
    await store.batches.add(batch)
    lines = [Line(number, f"id-{number}", 0, 1) for number in range(1, num_lines + 1)]
    await store.batches.begin(batch, lines, "m", 101)
    return await store.batches.get("a", batch.id), lines


async def test_a_line_counts_once(store: Store) -> None:
    batch, lines = await begun(store, 3)
    assert (batch.status, batch.total, batch.model) == ("in_progress", 3, "m")
    for _ in range(2):
        await store.batches.record(batch, Result(lines[0], b"one", False, 5, 1, 7, 2))
    await store.batches.record(batch, Result(lines[2], b"three", True))
    batch = await store.batches.get("a", batch.id)
    assert (batch.completed, batch.failed) == (1, 1)
    assert (batch.input_tokens, batch.cached_tokens) == (5, 1)
    assert (batch.output_tokens, batch.reasoning_tokens) == (7, 2)
    assert await store.batches.pending(batch, 0, 10) == [lines[1]]


async def test_files_are_made_at_the_end_and_only_those_needed(store: Store) -> None:
    batch, lines = await begun(store, 1201)
    for line in lines:
        await store.batches.record(batch, Result(line, b"line %d" % line.number, False))
    await store.batches.finalize(batch, "completed", [], 102)
    batch = await store.batches.get("a", batch.id)
    await store.batches.finish(batch, store.files, 103, None)
    batch = await store.batches.get("a", batch.id)
    assert (batch.status, batch.completed_at, batch.error_file_id) == ("completed", 103, None)
    assert batch.output_file_id is not None
    file = await store.files.get("a", batch.output_file_id, 103)
    expected = b"".join(b"line %d\n" % line.number for line in lines)
    assert store.files.path(file).read_bytes() == expected
    assert file.bytes == len(expected)


async def test_cancel_is_for_what_runs(store: Store) -> None:
    batch, _ = await begun(store, 1)
    assert (await store.batches.cancel("a", batch.id, 105)).status == "cancelling"
    assert (await store.batches.cancel("a", batch.id, 106)).cancelling_at == 105
    with pytest.raises(NotFound):
        await store.batches.cancel("b", batch.id, 105)
