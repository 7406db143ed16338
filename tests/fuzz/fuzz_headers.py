"""Mutated headers of GGUF and safetensors files: each is read or refused, in bounded memory.

    PYTHONPATH=tests python tests/fuzz/fuzz_headers.py --count 100000 --seed 1

A case is made from (seed, number) alone. One that fails is written to --keep, and named. Crashes
and hangs end the process with a traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf_bytes import ARRAY, F32, STRING, U32, Gguf, array_of, pair, string, strings, tensor, u32

from quantd.daemon.worker.gguf_source import GgufSource, open_source
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.source import SafetensorsSource
from quantd.plugins.api import Refused

PEAK_BYTES = 8 << 20
"""Of Python's own memory in one case; the files have a few thousand bytes."""
GROWTH_BYTES = 256 << 20
"""Of the process, over all cases."""
_HANG_SECONDS = 600
_READ_BYTES = 1 << 16
_NUMBERS = (0, 1, 7, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)


def gguf_seed(experts: bool) -> bytes:
    """A small llama, or a mixtral, with most kinds of metadata."""
    float32 = struct.pack("<f", 1e-5)
    keys: Mapping[str, int] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
    }
    if experts:
        keys = {**keys, "expert_count": 2, "expert_used_count": 1}
    pairs = [pair("general.architecture", STRING, string("llama"))]
    pairs += [pair(f"llama.{key}", U32, u32(value)) for key, value in keys.items()]
    pairs += [
        pair("llama.attention.layer_norm_rms_epsilon", F32, float32),
        pair("general.alignment", U32, u32(32)),
        pair("tokenizer.ggml.tokens", ARRAY, strings(["<s>", "é", ""])),
        pair("tokenizer.ggml.token_type", ARRAY, array_of(U32, 3, bytes(12))),
        pair("x.nested", ARRAY, array_of(ARRAY, 1, strings(["a"]))),
    ]
    tensors, data = [], b""
    shapes: dict[str, tuple[tuple[int, ...], int, int]] = {
        "token_embd.weight": ((32, 8), 2, 144),
        "output_norm.weight": ((32,), 0, 128),
        "rope_freqs.weight": ((8,), 0, 32),
        "blk.0.attn_q.weight": ((32, 32), 8, 1088),
        "blk.0.attn_k.weight": ((32, 32), 1, 2048),
    }
    if experts:
        shapes["blk.0.ffn_up_exps.weight"] = ((32, 4, 2), 2, 144)
        shapes["blk.1.attn_qkv.weight"] = ((32, 96), 2, 1728)
    for name, (dims, kind, nbytes) in shapes.items():
        tensors.append(tensor(name, dims, kind, len(data)))
        data += struct.pack("<f", 1.0) * (nbytes // 4) + bytes(nbytes % 4 + -nbytes % 32)
    return Gguf(pairs, tensors, data).encode()


def safetensors_seed() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "b.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [32, 38]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [38, 46]},
        "d": {"dtype": "U8", "shape": [0, 5], "data_offsets": [46, 46]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(46)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes, most of them near the start, where the header is."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = min(int(rng.random() ** 1.5 * len(out)), max(len(out) - 1, 0))
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            number = rng.choice(_NUMBERS).to_bytes(8, "little")[: rng.choice((1, 4, 8))]
            out[at : at + len(number)] = number
        elif kind == 2:
            del out[at : at + rng.randint(1, 40)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 80)]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            other = rng.randrange(len(out) + 1)
            out[at : at + 8] = out[other : other + 8]
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(out)


def _read_all(source: GgufSource | SafetensorsSource) -> None:
    for name in source.names():
        source.dtype(name)
        if len(source.shape(name)) <= 4:
            value = source.read(name)
            if value.nbytes <= _READ_BYTES:
                value.clone()
            source.release(name)


def open_gguf_file(path: Path) -> None:
    source = open_source(path)
    _read_all(source)
    read_config(source.config)


def open_safetensors(path: Path) -> None:
    _read_all(SafetensorsSource(path.parent, {}))


Opens = Callable[[Path], None]
TARGETS: tuple[tuple[str, bytes, Opens], ...] = (
    ("model.gguf", gguf_seed(experts=False), open_gguf_file),
    ("model.gguf", gguf_seed(experts=True), open_gguf_file),
    ("model.safetensors", safetensors_seed(), open_safetensors),
)


def case(seed: int, number: int) -> tuple[str, bytes, Opens]:
    name, data, opens = TARGETS[number % len(TARGETS)]
    return name, mutated(data, random.Random(seed << 32 | number)), opens


def run(seed: int, start: int, count: int, folder: Path) -> tuple[int, list[str]]:
    """(how many files were read, what went wrong)"""
    accepted, failures = 0, []
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(start, start + count):
        name, data, opens = case(seed, number)
        path = folder / name
        path.write_bytes(data)
        tracemalloc.reset_peak()
        used = tracemalloc.get_traced_memory()[0]
        try:
            opens(path)
            accepted += 1
        except Refused as error:
            if not str(error):
                failures.append(f"case {number}: refused without a word")
        except Exception as error:
            failures.append(f"case {number}: {type(error).__name__}: {error}")
        peak = tracemalloc.get_traced_memory()[1] - used
        if peak > PEAK_BYTES:
            failures.append(f"case {number}: took {peak} bytes, the limit is {PEAK_BYTES}")
        path.unlink()
        if number % 100 == 0:
            faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    faulthandler.cancel_dump_traceback_later()
    tracemalloc.stop()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if growth > GROWTH_BYTES:
        failures.append(f"the process grew by {growth} bytes, the limit is {GROWTH_BYTES}")
    return accepted, failures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, help="a folder for files that fail")
    options: Any = parser.parse_args(arguments)
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        accepted, failures = run(options.seed, options.start, options.count, Path(folder))
    for failure in failures[:20]:
        print(failure)
        if options.keep is not None and failure.startswith("case "):
            number = int(failure.split()[1].rstrip(":"))
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}.bin").write_bytes(case(options.seed, number)[1])
    print(f"{options.count} files: {accepted} read, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
