"""The disk tier's thread: files that are right, and every way for them not to be."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from quantd.daemon.types import DiskDone, DiskIndex, DiskOp
from quantd.daemon.worker.disk import DiskTier

SIZE = 4096


class Disk:
    """A tier over a host pool of three places, run in step with the test."""

    def __init__(self, folder: Path, revision: str = "r", budget: int = 1 << 30) -> None:
        self.places = [bytearray(SIZE) for _ in range(3)]
        self.sent: list[DiskDone | DiskIndex] = []
        self.tier = DiskTier(
            folder,
            revision,
            budget,
            SIZE,
            lambda place: memoryview(self.places[place]),
            self.sent.append,
        )

    def do(self, kind: str, key: bytes, place: int = -1) -> str | None:
        count = len(self.sent)
        self.tier.execute(DiskOp(kind, key, place))  # type: ignore[arg-type]
        if kind == "remove":
            assert len(self.sent) == count
            return None
        done = self.sent[-1]
        assert isinstance(done, DiskDone) and (done.kind, done.key) == (kind, key)
        return done.error

    def index(self) -> tuple[bytes, ...]:
        return self.tier.scan()

    def file(self, key: bytes) -> Path:
        return self.tier._path(key)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    made = Disk(tmp_path)
    assert made.index() == ()
    return made


KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def test_what_was_written_is_read_by_the_next_process(disk: Disk, tmp_path: Path) -> None:
    disk.places[0][:] = os.urandom(SIZE)
    assert disk.do("write", KEY, 0) is None
    after = Disk(tmp_path)
    assert after.index() == (KEY,)
    assert after.do("read", KEY, 2) is None
    assert after.places[2] == disk.places[0]
    after.do("remove", KEY)
    assert after.index() == ()
    assert "FileNotFoundError" in str(after.do("read", KEY, 1))


def test_another_revision_sees_nothing(disk: Disk, tmp_path: Path) -> None:
    disk.do("write", KEY, 0)
    assert Disk(tmp_path, "s").index() == ()


@pytest.mark.parametrize("at", [0, 10, 40, 70, 90, 2000, -1])
def test_a_flipped_bit_is_found_and_the_file_removed(disk: Disk, at: int) -> None:
    disk.do("write", KEY, 0)
    path = disk.file(KEY)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert "not what its name says" in str(disk.do("read", KEY, 1))
    assert not path.exists()


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_file_of_another_length(disk: Disk, change) -> None:  # type: ignore[no-untyped-def]
    disk.do("write", KEY, 0)
    path = disk.file(KEY)
    path.write_bytes(change(path.read_bytes()))
    assert "not what its name says" in str(disk.do("read", KEY, 1))
    assert not path.exists()
    disk.do("write", KEY, 0)
    path.write_bytes(change(path.read_bytes()))
    assert disk.index() == ()
    assert not path.exists(), "the next process finds it cut off, and will never use it"


def test_a_renamed_file_is_not_another_block(disk: Disk) -> None:
    disk.do("write", KEY, 0)
    disk.file(KEY).rename(disk.file(OTHER))
    assert "not what its name says" in str(disk.do("read", OTHER, 1))


def test_the_order_of_use_survives(disk: Disk, tmp_path: Path) -> None:
    disk.do("write", KEY, 0)
    disk.do("write", OTHER, 0)
    os.utime(disk.file(KEY), ns=(1, 1))
    os.utime(disk.file(OTHER), ns=(2, 2))
    assert Disk(tmp_path).index() == (KEY, OTHER)
    disk.do("read", KEY, 1)
    assert Disk(tmp_path).index() == (OTHER, KEY)


def test_a_disk_that_fails_leaves_nothing_half_written(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in str(disk.do("write", KEY, 0))
    assert list(disk.tier._folder.iterdir()) == []
    monkeypatch.setattr(Path, "replace", original)
    assert disk.do("write", KEY, 0) is None


def test_a_folder_that_is_gone_or_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    disk = Disk(tmp_path / "file")
    assert disk.index() == ()
    assert disk.do("write", KEY, 0) is not None
    assert disk.do("read", KEY, 0) is not None


def test_strays_go_and_strangers_stay(disk: Disk, tmp_path: Path) -> None:
    folder = disk.tier._folder
    dead = folder / f"{KEY.hex()}.{'0' * 16}.new"
    living = folder / f"{OTHER.hex()}.{'1' * 16}.new"
    strangers = [folder / "notes.txt", folder / "a.new", folder / f"{KEY.hex()}.kv.bak"]
    for path in (dead, living, *strangers):
        path.write_bytes(b"x")
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does, in this process or another
        assert Disk(tmp_path).index() == ()
        assert sorted(folder.iterdir()) == sorted([living, *strangers])
    assert Disk(tmp_path).index() == ()
    assert sorted(folder.iterdir()) == sorted(strangers)


def test_a_temporary_file_is_locked_while_it_is_written(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        Disk(tmp_path).index()  # another worker starts just now
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert disk.do("write", KEY, 0) is None
    assert disk.index() == (KEY,)


def test_a_name_that_is_no_file_is_not_opened(disk: Disk) -> None:
    os.mkfifo(disk.file(KEY))  # reading it would wait for ever
    disk.file(OTHER).symlink_to("/dev/zero")
    assert disk.index() == ()
    assert disk.file(KEY).exists() and disk.file(OTHER).is_symlink()


def other_file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.kv"))


def test_other_revisions_keep_the_budget_of_the_folder(tmp_path: Path) -> None:
    """Oldest first, also as this revision grows; their empty folders go."""
    keys = [bytes([i]) * 32 for i in range(9)]
    size = 0
    for age, (revision, key) in enumerate([("a", keys[0]), ("b", keys[1]), ("a", keys[2])]):
        other = Disk(tmp_path, revision)
        other.index()
        other.do("write", key, 0)
        os.utime(other.file(key), ns=(age, age))
        size = other.file(key).stat().st_size
    first, second, third = (
        Disk(tmp_path, revision).file(key)
        for revision, key in (("a", keys[0]), ("b", keys[1]), ("a", keys[2]))
    )
    disk = Disk(tmp_path, "r", budget=4 * size)
    assert disk.index() == ()
    disk.do("write", keys[3], 0)
    assert first.exists() and second.exists() and third.exists()
    disk.do("write", keys[4], 0)
    assert not first.exists() and second.exists() and third.exists()
    disk.do("write", keys[5], 0)
    assert not second.parent.exists() and third.exists()
    disk.do("write", keys[6], 0)
    assert not third.exists()
    assert other_file_bytes(tmp_path) == 4 * size
    smaller = Disk(tmp_path, "s", budget=2 * size)
    smaller.index()
    assert other_file_bytes(tmp_path) == 2 * size, "a smaller budget counts at once"


def test_what_is_not_certainly_ours_is_never_removed(tmp_path: Path) -> None:
    theirs = [
        tmp_path / "models" / f"{KEY.hex()}.kv",
        tmp_path / "0123456789abcdef" / "notes.txt",
        tmp_path / "0123456789abcdef" / f"{KEY.hex()}.kv",
        tmp_path / f"{KEY.hex()}.kv",
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not a block" * 100)
    other = Disk(tmp_path, "a")
    other.index()
    other.do("write", KEY, 0)
    moved = tmp_path / "fedcba9876543210" / other.file(KEY).name
    moved.parent.mkdir()
    moved.write_bytes(other.file(KEY).read_bytes())  # in a folder that is not its revision's
    disk = Disk(tmp_path, "r", budget=1)
    disk.index()
    assert all(path.exists() for path in (*theirs, moved))
    assert not other.file(KEY).exists()


def test_the_thread_answers_in_order_and_begins_with_the_index(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    answered = threading.Event()
    sent: list[DiskDone | DiskIndex] = []

    def send(message: DiskDone | DiskIndex) -> None:
        sent.append(message)
        if len(sent) == 4:
            answered.set()

    disk.tier._send = send
    disk.tier.start()
    for op in (
        DiskOp("write", KEY, 0),
        DiskOp("read", OTHER, 1),
        DiskOp("remove", OTHER),
        DiskOp("read", KEY, 1),
    ):
        disk.tier.put(op)
    assert answered.wait(240)
    index, *rest = sent
    assert isinstance(index, DiskIndex) and index.file_bytes > SIZE
    assert [(d.kind, d.key, d.error is None) for d in rest if isinstance(d, DiskDone)] == [
        ("write", KEY, True),
        ("read", OTHER, False),
        ("read", KEY, True),
    ]
