"""Pools that grow and shrink, over a driver of host memory in which a mistake is an error."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.fake_driver import (
    GRANULARITY,
    INVALID,
    NOT_SUPPORTED,
    OK,
    OUT_OF_MEMORY,
    FakeLibrary,
    is_accessible,
)
from numerics.tiny import Family, make_model, prompt_of

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
)
from quantd.daemon.worker import load, memory
from quantd.daemon.worker.gpu import driver as cuda
from quantd.daemon.worker.gpu.driver import PROTOTYPES, DriverError, open_driver
from quantd.daemon.worker.gpu.reserved import ReservedPools, chunk_bytes
from quantd.daemon.worker.memory import KvPools
from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.runner import Runner

CPU = torch.device("cpu")
NUM_POOLS = 4
SHAPE = (2, 16, 48)
"""6,144 bytes of float32: chunks end within blocks."""
STEP = 2 * 16 * 48 * 4


@pytest.fixture
def library() -> Iterator[FakeLibrary]:
    made = FakeLibrary()
    yield made
    made.close()


def make(library: FakeLibrary, num_blocks: int = 100) -> ReservedPools:
    return ReservedPools(library.driver(), CPU, NUM_POOLS, num_blocks, SHAPE, torch.float32)


def chunks(library: FakeLibrary) -> int:
    return len({id(memory) for memory in library.mapped.values()})


def test_memory_comes_with_the_blocks(library: FakeLibrary) -> None:
    pools = make(library)
    assert [tensor.dtype for tensor in pools.tensors] == [torch.float32] * NUM_POOLS
    assert all(tensor.shape[1:] == SHAPE for tensor in pools.tensors)
    assert all(len(tensor) == pools.waste_block + 1 for tensor in pools.tensors)
    assert pools.mapped_bytes == 0
    assert library.used == GRANULARITY, "the waste block's, once for all"
    pools.ensure(1)
    assert pools.mapped_bytes == NUM_POOLS * GRANULARITY == library.used - GRANULARITY
    pools.ensure(10)
    assert pools.mapped_bytes == NUM_POOLS * GRANULARITY, "65,536 bytes are ten blocks and a part"
    pools.ensure(11)
    assert pools.mapped_bytes == 2 * NUM_POOLS * GRANULARITY
    for i, tensor in enumerate(pools.tensors):
        tensor[:11] = i
    assert [int(tensor[:11].sum()) // tensor[:11].numel() for tensor in pools.tensors] == [
        0,
        1,
        2,
        3,
    ]
    first = pools.tensors[0]
    assert is_accessible(first.data_ptr(), 2 * GRANULARITY)
    assert not is_accessible(first.data_ptr() + 2 * GRANULARITY, 1)
    calls = len(library.calls)
    pools.ensure(11)
    pools.ensure(5)
    pools.ensure_blocks((3, 10))
    assert len(library.calls) == calls, "nothing to do"


def test_the_waste_block_is_nobodys(library: FakeLibrary) -> None:
    pools = make(library)
    for tensor in pools.tensors:
        tensor[pools.waste_block] = 7
    pools.ensure(100)
    for tensor in pools.tensors:
        tensor[:100] = 1
        tensor[pools.waste_block] = 2
        assert torch.all(tensor[:100] == 1)
    pools.release([(0, 100)])
    assert pools.mapped_bytes == 0
    for tensor in pools.tensors:
        tensor[pools.waste_block] = 3


def test_the_first_address_can_always_be_read(library: FakeLibrary) -> None:
    """Triton refuses to launch with a tensor whose first address the driver says nothing of."""
    pools = make(library)
    first = [tensor.data_ptr() for tensor in pools.tensors]
    assert all(is_accessible(address, 1) for address in first)
    assert library.used == GRANULARITY, "it takes no memory of its own"
    pools.ensure_blocks([90])
    assert all(is_accessible(address, 1) for address in first)
    assert not is_accessible(first[0] + GRANULARITY, 1)
    for i, tensor in enumerate(pools.tensors):
        tensor[90] = 10 + i
    pools.ensure_blocks([0])
    for i, tensor in enumerate(pools.tensors):
        tensor[0], tensor[pools.waste_block] = i, -1
        assert torch.all(tensor[0] == i) and torch.all(tensor[90] == 10 + i)
    pools.release([(0, 1)])
    assert all(is_accessible(address, 1) for address in first)
    assert all(torch.all(tensor[90] == 10 + i) for i, tensor in enumerate(pools.tensors))
    assert pools.mapped_bytes == library.used - GRANULARITY


@pytest.mark.parametrize("name", ["cuMemRetainAllocationHandle", "cuMemMap", "cuMemSetAccess"])
def test_pools_whose_first_address_cannot_be_lent_memory_leave_nothing(
    library: FakeLibrary, name: str
) -> None:
    library.fail = fail_at(name, 1 if "Retain" in name else NUM_POOLS + 2, INVALID)
    with pytest.raises(DriverError, match=name):
        make(library)
    gc.collect()
    library.close()


def test_only_whole_chunks_go_and_parts_add_up(library: FakeLibrary) -> None:
    pools = make(library)
    pools.ensure(33)  # in chunks 0 to 3, of which the last has more blocks
    full = pools.mapped_bytes
    assert full == 4 * NUM_POOLS * GRANULARITY
    for tensor in pools.tensors:
        tensor[:33] = 5
    pools.release([(0, 10)])  # block 10 has a part of chunk 0
    assert pools.mapped_bytes == full
    library.calls.clear()
    pools.release([(10, 12)])
    assert library.calls[0] == "synchronize", "the device may be at work on it"
    assert pools.mapped_bytes == full - NUM_POOLS * GRANULARITY
    for tensor in pools.tensors:
        assert torch.all(tensor[12:33] == 5)
        assert not bool((tensor[0] == 5).any()), "the first chunk is there, and is another one"
    pools.ensure_blocks([2, 32])
    assert pools.mapped_bytes == full
    pools.release([(12, 33)])
    assert pools.mapped_bytes == NUM_POOLS * GRANULARITY, "block 2 is in use again"


def test_what_is_released_below_stays_released(library: FakeLibrary) -> None:
    pools = make(library)
    pools.ensure(100)
    pools.release([(0, 60)])
    few = pools.mapped_bytes
    pools.ensure_blocks([99, 70])
    assert pools.mapped_bytes == few
    pools.ensure(61)
    assert pools.mapped_bytes > few


def test_too_little_memory_changes_nothing(library: FakeLibrary) -> None:
    pools = make(library)
    pools.ensure(5)
    pools.tensors[3][:5] = 4
    # Room for one chunk of all pools, and for half of the next one.
    library.budget = library.used + 6 * GRANULARITY
    state = dict(library.mapped), pools.mapped_bytes
    more = 3 * NUM_POOLS * GRANULARITY
    message = f"have {pools.mapped_bytes} bytes and need {more} more.*cuMemCreate: out of memory"
    for _ in range(2):
        with pytest.raises(MemoryError, match=message):
            pools.ensure(40)
        assert (dict(library.mapped), pools.mapped_bytes) == state
    assert torch.all(pools.tensors[3][:5] == 4)
    library.budget += 1 << 30
    pools.ensure(40)
    assert pools.mapped_bytes == 4 * NUM_POOLS * GRANULARITY


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("status", [INVALID, OUT_OF_MEMORY])
def test_an_error_in_the_middle_changes_nothing(
    library: FakeLibrary, name: str, status: int
) -> None:
    pools = make(library)
    pools.ensure(5)
    state = dict(library.mapped), pools.mapped_bytes
    for nth in (1, 3, NUM_POOLS + 2):
        library.fail = fail_at(name, nth, status)
        error = MemoryError if status == OUT_OF_MEMORY else DriverError
        with pytest.raises(error, match=f"{name}: (invalid argument|out of memory)"):
            pools.ensure(40)
        library.fail = lambda name: OK
        assert (dict(library.mapped), pools.mapped_bytes) == state
        assert library.used == (NUM_POOLS + 1) * GRANULARITY
    pools.ensure(40)
    assert all(is_accessible(tensor.data_ptr(), 40 * STEP) for tensor in pools.tensors)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap"])
def test_pools_that_cannot_be_made_leave_nothing(library: FakeLibrary, name: str, nth: int) -> None:
    library.fail = fail_at(name, nth, INVALID)
    if (name, nth) == ("cuMemCreate", 2):
        nth = 1  # there is one only
        library.fail = fail_at(name, nth, INVALID)
    with pytest.raises(DriverError, match=name):
        make(library)
    gc.collect()
    library.close()


def fail_at(name: str, nth: int, status: int) -> Callable[[str], int]:
    left = nth

    def fail(called: str) -> int:
        nonlocal left
        left -= called == name
        return status if called == name and left == 0 else OK

    return fail


def test_memory_lives_as_long_as_a_view(library: FakeLibrary) -> None:
    pools = make(library)
    pools.ensure(3)
    view = pools.tensors[1][1:3, 0].view(torch.int32)
    del pools
    gc.collect()
    assert len(library.reserved) == 1
    view.fill_(9)
    assert torch.all(view == 9)
    del view
    gc.collect()
    library.close()


def test_the_fake_is_strict(library: FakeLibrary) -> None:
    driver = library.driver()
    address = driver.reserve(4 * GRANULARITY)
    driver.map([address, address + GRANULARITY], GRANULARITY)
    ctypes.memset(address, 3, 8)
    assert ctypes.string_at(address + GRANULARITY, 2) == b"\3\3", "one memory at two addresses"
    for wrong in (
        lambda: driver.map([address], GRANULARITY),
        lambda: driver.map([address + 5 * GRANULARITY], GRANULARITY),
        lambda: driver.map([address + 2 * GRANULARITY + 4096], GRANULARITY),
        lambda: driver.unmap(address + 2 * GRANULARITY, GRANULARITY),
        lambda: driver.unmap(address, 2 * GRANULARITY),
        lambda: driver.free(address, 4 * GRANULARITY),
        lambda: driver.reserve(100),
    ):
        with pytest.raises(DriverError, match=r"cuMem\w+: invalid argument \(CUresult 1\)"):
            wrong()
    with pytest.raises(AssertionError, match="something leaks"):
        library.close()
    driver.unmap(address, GRANULARITY)
    driver.unmap(address + GRANULARITY, GRANULARITY)
    driver.free(address, 4 * GRANULARITY)


BLOCKS = 60
block = st.integers(0, BLOCKS)
orders = st.one_of(
    st.tuples(st.just("ensure"), st.tuples(st.just(0), block)),
    st.tuples(st.just("blocks"), st.tuples(block, block)),
    st.tuples(st.just("release"), st.tuples(block, block)),
    st.tuples(st.just("memory"), st.tuples(st.integers(1, 30), st.just(0))),
)


class Used:
    """Pools, and what was written to the blocks that are in use."""

    def __init__(self, library: FakeLibrary, shape: tuple[int, ...]) -> None:
        self.pools = ReservedPools(library.driver(), CPU, 2, BLOCKS, shape, torch.float32)
        self.step = self.pools.tensors[0][0].nbytes
        self.written: dict[int, float] = {}
        self._serial = 0.0

    def write(self, blocks: range) -> None:
        for block in blocks:
            if block not in self.written:
                self._serial += 1
                self.written[block] = self._serial
                for i, tensor in enumerate(self.pools.tensors):
                    tensor[block] = 2 * self._serial + i

    def release(self, blocks: range) -> None:
        for block in blocks:
            self.written.pop(block, None)
        self.pools.release([(blocks.start, blocks.stop)])

    def check(self) -> None:
        """Blocks have their bytes, and there is memory under them and nothing else."""
        wanted = {
            chunk
            for block in self.written
            for chunk in range(
                block * self.step // GRANULARITY,
                ((block + 1) * self.step - 1) // GRANULARITY + 1,
            )
        }
        assert self.pools.mapped_bytes == 2 * GRANULARITY * len(wanted)
        assert all(is_accessible(tensor.data_ptr(), 1) for tensor in self.pools.tensors)
        for i, tensor in enumerate(self.pools.tensors):
            assert all(torch.all(tensor[at] == 2 * x + i) for at, x in self.written.items())


@settings(max_examples=50, deadline=None)
@given(st.lists(orders, max_size=15), st.sampled_from([SHAPE, (1, 16, 4), (4, 16, 400)]))
def test_any_order_of_orders(
    todo: list[tuple[str, tuple[int, int]]], shape: tuple[int, ...]
) -> None:
    library = FakeLibrary()
    used = Used(library, shape)
    for kind, (start, stop) in todo:
        blocks = range(min(start, stop), max(start, stop))
        if kind == "memory":
            library.budget = start * GRANULARITY
        elif kind == "release":
            used.release(blocks)
        else:
            try:
                if kind == "ensure":
                    used.pools.ensure(stop)
                else:
                    used.pools.ensure_blocks(blocks)
                used.write(blocks)
            except MemoryError:
                pass
        used.check()
    used.release(range(BLOCKS))
    used.check()
    assert library.used <= used.step + 2 * GRANULARITY, "the waste block's"
    del used
    library.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_model(Family("llama", {"tie_word_embeddings": True}), made)
    return made


def on_reserved(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> list[KvPools]:
    """Models are loaded with the pools of a CUDA device, over the library's memory."""
    made: list[KvPools] = []
    monkeypatch.setattr(memory, "open_driver", lambda device: library.driver())

    def allocate(
        config: ModelConfig, dtype: torch.dtype, device: torch.device, blocks: int
    ) -> KvPools:
        plain = memory.allocate(config, dtype, device, blocks)
        layers, shape = len(config.layers), tuple(plain.keys[0].shape[1:])
        tensors, reserved, notes = memory._on_cuda(CPU, 2 * layers, plain.num_blocks, shape, dtype)
        keys, values = tensors[:layers], tensors[layers:]
        made.append(KvPools(keys, values, plain.num_blocks, plain.block_bytes, (), reserved, notes))
        return made[0]

    monkeypatch.setattr(load, "allocate", allocate)
    return made


def test_a_runner_touches_no_memory_that_is_not_there(
    library: FakeLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else this process ends. Chunks, copies of all kinds, memory given back in between."""
    frame = LoadModel("tiny", str(folder), dtype="float32", threads=1, host_kv_bytes=1 << 20)
    expected = _talk(Runner(frame, lambda progress: None))
    pools = on_reserved(library, monkeypatch)
    runner = Runner(frame, lambda progress: None)
    assert runner.info.max_blocks == runner.info.num_blocks == pools[0].num_blocks
    assert pools[0].waste_block >= pools[0].max_blocks
    assert library.used == GRANULARITY
    for _ in range(2):
        assert _talk(runner) == expected
        assert library.used > GRANULARITY
        runner.release_memory([(0, runner.info.num_blocks)])
        assert library.used == GRANULARITY


def _talk(runner: Runner) -> list[Any]:
    prompt = prompt_of(40)
    new = NewSequence(1, prompt, 40, SamplingParams(max_tokens=9, temperature=0.0, logprobs=3))
    spill = tuple(BlockCopy("spill", block, place) for place, block in enumerate((250, 3)))
    fetch = tuple(BlockCopy("fetch", place, block) for place, block in enumerate((120, 180)))
    copy = BlockCopy("cow", 120, 60)
    again = NewSequence(2, prompt, 40, new.sampling)
    plans = [
        StepPlan(1, (Chunk(1, 0, 33, (250, 3, 9)),), add=(new,)),
        StepPlan(2, (Chunk(1, 33, 40, (), True),)),
        StepPlan(3, (Chunk(1, 40, 41, (), True),)),
        StepPlan(4, (), drop=(1,), copies=spill),
    ]
    results = [runner.execute(plan) for plan in plans]
    runner.release_memory([(0, 251)])
    plans = [
        StepPlan(5, (), copies=(*fetch, copy)),
        StepPlan(6, (Chunk(2, 32, 40, (60, 180, 7), True),), add=(again,)),
        StepPlan(7, (Chunk(2, 40, 41, (), True),)),
        StepPlan(8, (), drop=(2,)),
    ]
    results += [runner.execute(plan) for plan in plans]
    return [(item.token, item.logprob) for result in results for item in result.sampled]


def test_without_reserved_addresses_all_memory_is_taken_at_once(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "open_driver", lambda device: library.driver())
    library.supported = 0
    tensors, reserved, notes = memory._on_cuda(CPU, 2, 10, SHAPE, torch.float32)
    pools = KvPools(tensors[:1], tensors[1:], 10, 2 * STEP, (), reserved, notes)
    assert notes == (
        "the KV pools take all of their memory at once and keep it: "
        "the device has no virtual memory management",
    )
    assert (pools.max_blocks, pools.waste_block, len(tensors[0])) == (10, 10, 11)
    pools.ensure(10)
    pools.ensure_blocks([9])
    pools.release([(0, 10)])
    # A device that is full is another matter: the other way needs the same memory.
    library.supported, library.budget = 1, 0
    with pytest.raises(MemoryError, match="no memory for the KV pools: cuMemCreate: out of memory"):
        memory._on_cuda(CPU, 2, 10, SHAPE, torch.float32)


def test_chunks_grow_with_the_pools() -> None:
    mib = 1 << 20
    assert chunk_bytes(2 * mib, 1000, 64) == 2 * mib
    assert chunk_bytes(2 * mib, 256 * 2 * mib, 64) == 2 * mib
    assert chunk_bytes(2 * mib, 257 * 2 * mib, 64) == 4 * mib
    assert chunk_bytes(2 * mib, 1 << 50, 64) == 64 * mib
    assert chunk_bytes(128 * mib, 1 << 50, 64) == 128 * mib


def test_a_device_that_cannot(library: FakeLibrary) -> None:
    library.supported = 0
    with pytest.raises(DriverError, match="the device has no virtual memory management"):
        library.driver()
    library.fail = lambda name: NOT_SUPPORTED if name == "cuDeviceGetAttribute" else OK
    with pytest.raises(DriverError, match=r"cuDeviceGetAttribute: unknown error \(CUresult 801\)"):
        library.driver()


def test_no_driver_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match=r"libcuda.so.1: cannot open"):
        open_driver(torch.device("cuda:0"))


# --- against cuda.h ------------------------------------------------------------------------------

STRUCTS = {
    "CUmemLocation": cuda.Location,
    "CUmemAllocationProp": cuda.AllocationProp,
    "CUmemAccessDesc": cuda.AccessDesc,
}
CONSTANTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": cuda.OUT_OF_MEMORY,
    "CUDA_ERROR_DEINITIALIZED": cuda._DEINITIALIZED,
    "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": cuda._VIRTUAL_MEMORY_MANAGEMENT,
    "CU_MEM_ALLOCATION_TYPE_PINNED": cuda._PINNED,
    "CU_MEM_LOCATION_TYPE_DEVICE": cuda._ON_DEVICE,
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": cuda._READ_WRITE,
    "CU_MEM_ALLOC_GRANULARITY_RECOMMENDED": cuda._RECOMMENDED,
}


def compile_against(header: Path, expressions: list[str], folder: Path) -> list[int]:
    """The value of each C expression."""
    prints = "".join(f'printf("%zu\\n", (size_t)({one}));' for one in expressions)
    source = (
        f"#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{{prints}}}"
    )
    (folder / "ask.c").write_text(source)
    command = ["cc", "-I", str(header.parent), str(folder / "ask.c"), "-o", str(folder / "ask")]
    subprocess.run(command, check=True)
    found = subprocess.run([str(folder / "ask")], check=True, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.fixture
def header() -> Path:
    triton = pytest.importorskip("triton")
    found = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h"
    if not found.exists() or shutil.which("cc") is None:
        pytest.skip("no cuda.h, or no compiler")
    return found


def test_structs_and_constants_are_those_of_the_header(header: Path, tmp_path: Path) -> None:
    expected: dict[str, int] = dict(CONSTANTS)
    for name, struct in STRUCTS.items():
        expected[f"sizeof({name})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            expected[f"offsetof({name}, {field})"] = getattr(struct, field).offset
            expected[f"sizeof((({name} *)0)->{field})"] = getattr(struct, field).size
    for field, *_ in cuda.AllocationFlags._fields_:
        at = cuda.AllocationProp.allocFlags.offset + getattr(cuda.AllocationFlags, field).offset
        expected[f"offsetof(CUmemAllocationProp, allocFlags.{field})"] = at
    values = compile_against(header, list(expected), tmp_path)
    assert dict(zip(expected, values, strict=True)) == expected


def test_signatures_are_those_of_the_header(header: Path, tmp_path: Path) -> None:
    """Pointer or not, and the size of the argument and of what a pointer points to."""
    text = header.read_text()
    asked: list[str] = []
    expected: list[int] = []
    for name, arguments in PROTOTYPES.items():
        found = re.search(rf"^CUresult CUDAAPI {name}\((.*?)\);", text, re.MULTILINE)
        assert found is not None, f"{name} is not in the header"
        assert f"#define {name} " not in text.replace("    ", " "), f"{name} has versions"
        declared = [re.sub(r"\w+$", "", one.strip()).strip() for one in found[1].split(",")]
        assert len(declared) == len(arguments), name
        for kind, argument in zip(declared, arguments, strict=True):
            is_pointer = "*" in kind and kind != "void *"
            pointee = getattr(argument, "_type_", None) if is_pointer else None
            assert is_pointer == isinstance(pointee, type), f"{name}: {kind}"
            assert (kind == "void *") == (argument is ctypes.c_void_p), f"{name}: {kind}"
            asked += [f"sizeof({kind})", f"sizeof(*({kind})0)" if is_pointer else "0"]
            expected += [ctypes.sizeof(argument), ctypes.sizeof(pointee) if pointee else 0]
    assert compile_against(header, asked, tmp_path) == expected
