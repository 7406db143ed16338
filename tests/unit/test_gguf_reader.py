"""The GGUF container: what is read, and that nothing unsound is."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    TYPE_Q4_0,
    U32,
    Gguf,
    array_of,
    pair,
    string,
    strings,
    tensor,
    u32,
    u64,
)

from quantd.daemon.gguf.reader import GgufError, open_gguf, read_gguf

DATA = bytes(range(64))


def test_metadata_has_python_types(tmp_path: Path) -> None:
    file = Gguf(
        pairs=[
            pair("a.int", U32, u32(7)),
            pair("a.float", F32, b"\0\0\x80\x3f"),
            pair("a.bool", BOOL, b"\1"),
            pair("a.text", STRING, string("Grüße")),
            pair("a.words", ARRAY, strings(["x", "", "\U0001f600"])),
            pair("a.numbers", ARRAY, array_of(U32, 3, u32(1) + u32(2) + u32(3))),
            pair("a.flags", ARRAY, array_of(BOOL, 2, b"\1\0")),
            pair("a.nested", ARRAY, array_of(ARRAY, 2, strings(["p"]) + strings([]))),
        ]
    ).write(tmp_path / "m.gguf")
    assert read_gguf(file).metadata == {
        "a.int": 7,
        "a.float": 1.0,
        "a.bool": True,
        "a.text": "Grüße",
        "a.words": ["x", "", "\U0001f600"],
        "a.numbers": array("I", [1, 2, 3]),
        "a.flags": [True, False],
        "a.nested": [["p"], []],
    }


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_where_the_header_says(tmp_path: Path, version: int) -> None:
    tensors = [tensor("a", (4, 2)), tensor("b", (32,), TYPE_Q4_0, offset=32)]
    path = Gguf(tensors=tensors, data=DATA, version=u32(version)).write(tmp_path / "m.gguf")
    file = read_gguf(path)
    a, b = file.tensors.values()
    assert (a.name, a.type_name, a.dims, a.nbytes) == ("a", "F32", (2, 4), 32)
    assert (b.name, b.type_name, b.dims, b.nbytes) == ("b", "Q4_0", (32,), 18)
    assert file.data_start % 32 == 0
    whole = path.read_bytes()
    assert whole[a.offset : a.offset + a.nbytes] == DATA[:32]
    assert whole[b.offset : b.offset + b.nbytes] == DATA[32:50]


def test_alignment_is_what_the_file_says(tmp_path: Path) -> None:
    file = Gguf([pair("general.alignment", U32, u32(128))], [tensor("a")], DATA, alignment=128)
    assert read_gguf(file.write(tmp_path / "m.gguf")).data_start == 128


UNSOUND: dict[str, tuple[Callable[[], Gguf], str]] = {
    "magic": (lambda: Gguf(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (lambda: Gguf(version=u32(1)), "version is 1"),
    "version 4": (lambda: Gguf(version=u32(4)), "version is 4"),
    "big-endian": (lambda: Gguf(version=b"\0\0\0\3"), "big-endian"),
    "too many pairs": (lambda: Gguf(num_pairs=1 << 60), "metadata keys is 1152921504606846976"),
    "too many tensors": (lambda: Gguf(num_tensors=1 << 60), "number of tensors is"),
    "pairs that are not there": (lambda: Gguf(num_pairs=1), "number of metadata keys is 1"),
    "a long key": (lambda: Gguf([pair("k" * 300, U32, u32(1))]), "has 300 bytes"),
    "an empty key": (lambda: Gguf([pair("", U32, u32(1)), bytes(16)], num_pairs=1), "has 0 bytes"),
    "a key twice": (lambda: Gguf([pair("k", U32, u32(1))] * 2), "key k occurs twice"),
    "a key beyond the file": (
        lambda: Gguf([u64(1 << 62) + bytes(16)]),
        "has 4611686018427387904 bytes, 32 are left",
    ),
    "a type of value": (lambda: Gguf([pair("k", 13, u32(1))]), "k is of the type number 13"),
    "a type of item": (
        lambda: Gguf([pair("k", ARRAY, array_of(99, 1, u32(0)))]),
        "items of k are of the type number 99",
    ),
    "a count of items": (
        lambda: Gguf([pair("k", ARRAY, array_of(U32, 1 << 61, u32(0)))]),
        "number of items of k is 2305843009213693952",
    ),
    "a count of strings": (
        lambda: Gguf([pair("k", ARRAY, array_of(STRING, 1 << 40, b""))]),
        "number of items of k is",
    ),
    "a string in an array": (
        lambda: Gguf([pair("k", ARRAY, array_of(STRING, 1, u64(1 << 63)))]),
        "a string of k has",
    ),
    "a count of arrays": (
        lambda: Gguf([pair("k", ARRAY, array_of(ARRAY, 1 << 50, b""))]),
        "number of items of k is",
    ),
    "nesting": (
        lambda: Gguf([pair("k", ARRAY, array_of(ARRAY, 1, b"") * 9 + bytes(64))]),
        "k nests arrays more than 4 deep",
    ),
    "no UTF-8": (lambda: Gguf([pair("k", STRING, string(b"\xff\xfe"))]), "k is not UTF-8"),
    "no bool": (lambda: Gguf([pair("k", BOOL, b"\2")]), "k is 2, must be 0 or 1"),
    "a tensor twice": (lambda: Gguf([], [tensor("a")] * 2, DATA), "tensor a occurs twice"),
    "no dimensions": (lambda: Gguf([], [tensor("a", ())], DATA), "has 0 dimensions"),
    "five dimensions": (lambda: Gguf([], [tensor("a", (1,) * 5)], DATA), "has 5 dimensions"),
    "many dimensions": (
        lambda: Gguf([], [string("a") + u32(1 << 31) + bytes(16)], DATA),
        "has 2147483648 dimensions",
    ),
    "a dimension of 0": (lambda: Gguf([], [tensor("a", (8, 0))], DATA), r"\[0, 8\] is empty"),
    "dimensions that overflow": (
        lambda: Gguf([], [tensor("a", (1 << 62, 1 << 62))], DATA),
        "cut off: the tensor a",
    ),
    "a type of tensor": (lambda: Gguf([], [tensor("a", kind=4)], DATA), "type number 4"),
    "a row of half a block": (
        lambda: Gguf([], [tensor("a", (33,), TYPE_Q4_0)], DATA),
        "rows of 33, must be a multiple of 32",
    ),
    "an offset beside the alignment": (
        lambda: Gguf([], [tensor("a", offset=8)], DATA),
        "offset of the tensor a is 8, must be a multiple of 32",
    ),
    "an offset beyond the file": (
        lambda: Gguf([], [tensor("a", offset=1 << 63)], DATA),
        "cut off: the tensor a ends at byte",
    ),
    "an end beyond the file": (
        lambda: Gguf([], [tensor("a", (17,))], DATA),
        "cut off: the tensor a ends at byte",
    ),
    "an overlap": (
        lambda: Gguf([], [tensor("a", (9,)), tensor("b", offset=32)], DATA),
        "the tensor b begins at byte .*, inside a,",
    ),
    "alignment 0": (
        lambda: Gguf([pair("general.alignment", U32, u32(0))]),
        "general.alignment is 0, must be a power of two",
    ),
    "alignment 48": (
        lambda: Gguf([pair("general.alignment", U32, u32(48))]),
        "general.alignment is 48, must be a power of two",
    ),
    "alignment 2**31": (
        lambda: Gguf([pair("general.alignment", U32, u32(1 << 31))]),
        "general.alignment is 2147483648, must be a power of two up to",
    ),
    "alignment of text": (
        lambda: Gguf([pair("general.alignment", STRING, string("32"))]),
        "general.alignment is '32', must be an integer",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_file_is_refused_by_what_is_wrong(name: str, tmp_path: Path) -> None:
    make, message = UNSOUND[name]
    path = make().write(tmp_path / "m.gguf")
    with pytest.raises(GgufError, match=message):
        read_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    pairs = [pair("k", ARRAY, strings(["one", "two"])), pair("n", U32, u32(5))]
    whole = Gguf(pairs, [tensor("a", (4, 2))], DATA[:32]).encode()
    path = tmp_path / "m.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            read_gguf(path)
    path.write_bytes(whole)
    assert list(read_gguf(path).tensors) == ["a"]


def test_a_header_without_end_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """A sparse file of zeros that claims a billion empty strings."""
    path = tmp_path / "m.gguf"
    start = Gguf([pair("k", ARRAY, array_of(STRING, 1 << 30, b""))], alignment=1).encode()
    with path.open("wb") as file:
        file.write(start)
        file.truncate(1 << 34)
    tracemalloc.start()
    with pytest.raises(GgufError, match="number of items of k is 1073741824"):
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "m.gguf")


def shard(number: int, count: int, name: str, total: int | None = None) -> Gguf:
    pairs = [pair("split.no", U32, u32(number)), pair("split.count", U32, u32(count))]
    if total is not None:
        pairs += [pair("split.tensors.count", U32, u32(total)), pair("k", U32, u32(5))]
    return Gguf(pairs, [tensor(name)], DATA[:32])


def test_shards_are_one_model(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        shard(i, 3, f"t{i}", 3 if i == 0 else None).write(path)
    model = open_gguf(paths[0])
    assert model.files == tuple(paths)
    assert model.metadata["k"] == 5
    assert {name: t.path for name, t in model.tensors.items()} == {
        f"t{i}": path for i, path in enumerate(paths)
    }
    with pytest.raises(GgufError, match="is shard 2 of 3; open m-00001-of-00003.gguf"):
        open_gguf(paths[1])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "the shard m-00002-of-00002.gguf is missing"),
        (shard(0, 2, "b"), "split.no is 0, must be 1"),
        (shard(1, 3, "b"), "split.count is 3, must be 2"),
        (shard(1, 2, "a"), "the tensor a is in m-00001-of-00002.gguf and in m-00002"),
        (Gguf([], [tensor("b")], DATA), "split.no is None"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    second: Gguf | None, message: str, tmp_path: Path
) -> None:
    first = shard(0, 2, "a", 2).write(tmp_path / "m-00001-of-00002.gguf")
    if second is not None:
        second.write(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(GgufError, match=message):
        open_gguf(first)


def test_a_wrong_total_of_tensors_is_refused(tmp_path: Path) -> None:
    first = shard(0, 2, "a", 5).write(tmp_path / "m-00001-of-00002.gguf")
    shard(1, 2, "b").write(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(GgufError, match="split.tensors.count is 5, but the 2 shards hold 2"):
        open_gguf(first)


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    first = shard(0, 2, "a", 2).write(tmp_path / "m.gguf")
    with pytest.raises(GgufError, match="name must end in -00001-of-00002.gguf"):
        open_gguf(first)
