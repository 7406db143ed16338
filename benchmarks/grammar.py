"""What grammars cost: tokens of 100 streams with 100 schemas beside the same without, and a mask.

python benchmarks/grammar.py --json results/grammar.json
python benchmarks/grammar.py --model models/S --rounds 2    # another checkpoint
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import idle
import load
import machine
import numpy as np

from quantd.daemon.grammar import limits, llguidance_text
from quantd.daemon.text import TextModel
from quantd.daemon.types import Grammar, TokenTable
from quantd.daemon.worker.grammar import Grammars

STREAMS, TOKENS, PROMPT_TOKENS = 100, 64, 24
TOKEN_IDS = range(300, 900)
"""Ordinary tokens of the embedded model."""
LARGE_VOCABULARY = 128_000
_DEMO = Path(__file__).parents[1] / "daemon" / "embedded" / "demo"


def schema(number: int) -> dict[str, Any]:
    """One of its own for each stream, with strings, numbers, an enum and a list. It is not over
    within `TOKENS`, so that both sides make as many tokens."""
    item = {
        "type": "object",
        "properties": {
            f"name_{number}": {"type": "string"},
            "kind": {"enum": [f"kind {number + i}" for i in range(8)]},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}},
        },
        "required": [f"name_{number}", "kind", "size", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 50}


async def streams(url: str, constrained: bool, temperature: float, repeat: int) -> list[float]:
    """The gaps between tokens of all streams, in ms."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        bodies = []
        for number in range(STREAMS):
            # Of its own for each run: what another run left in the cache would be a head start.
            own = random.Random(f"{number} {repeat} {constrained} {temperature}")
            prompt = own.choices(TOKEN_IDS, k=PROMPT_TOKENS)
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "seed": number}
            body["temperature"] = temperature
            if constrained:
                body["guided_json"] = schema(number)
            bodies.append(body)
        done = await asyncio.gather(*(load.complete(session, url, "demo", b) for b in bodies))
    failed = [stream.error for stream in done if stream.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    gaps = []
    for stream in done:
        times = stream.token_times
        gaps += [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
    return gaps


async def compare(url: str, temperature: float, rounds: int) -> dict[str, Any]:
    """Taking turns; the median over the rounds of each percentile."""
    seen: dict[bool, list[list[float]]] = {False: [], True: []}
    await streams(url, True, temperature, 99)  # the tokenizer and the grammars, once
    for repeat in range(rounds):
        for constrained in (False, True):
            seen[constrained].append(await streams(url, constrained, temperature, repeat))
    found: dict[str, Any] = {}
    for constrained, name in ((False, "free"), (True, "constrained")):
        for percent in (50, 99):
            values = [load.percentile(gaps, percent) for gaps in seen[constrained]]
            found[f"{name}_itl_p{percent}_ms"] = round(statistics.median(values), 3)
    for percent in (50, 99):
        ratios = [
            load.percentile(with_it, percent) / load.percentile(without, percent)
            for without, with_it in zip(seen[False], seen[True], strict=True)
        ]
        found[f"p{percent}_ratio"] = round(statistics.median(ratios), 3)
        found[f"p{percent}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return found


def large_table(text: TextModel) -> TokenTable:
    """The bytes and made-up words, in the number of a large model's vocabulary."""
    rng = random.Random(1)
    words = {bytes([i]) for i in range(256)} | set(text.vocabulary.pieces())
    letters = "abcdefghijklmnopqrstuvwxyz"
    marks = '{}[]":, \n0123456789'
    while len(words) < LARGE_VOCABULARY:
        word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 9)))
        word = rng.choice(["", " "]) + word + rng.choice(["", "", "", '"', '",', '":', ","])
        if rng.random() < 0.05:
            word = "".join(rng.choice(marks) for _ in range(rng.randint(2, 6)))
        words.add(word.encode())
    words.discard(b"")
    return TokenTable((*sorted(words), b"<end>"), (len(words),), (len(words),))


def masks(table: TokenTable) -> dict[str, float]:
    """Microseconds of one mask on one thread, over all places of random texts of all schemas."""
    from llguidance import LLMatcher

    grammars = Grammars(len(table.pieces))
    grammars.set_table(table)
    started = time.perf_counter()
    tokenizer = grammars._tokenizer_of_model()
    built = time.perf_counter() - started
    rng, micros, compiled = random.Random(2), [], []
    for number in range(STREAMS):
        started = time.perf_counter()
        text = llguidance_text(Grammar("json_schema", json.dumps(schema(number))))
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits())
        compiled.append(1e3 * (time.perf_counter() - started))
        for _ in range(TOKENS):
            started = time.perf_counter()
            bits = matcher.compute_bitmask()
            micros.append(1e6 * (time.perf_counter() - started))
            allowed = np.flatnonzero(
                np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
            )
            matcher.consume_token(int(rng.choice(allowed)))
    return {
        "vocabulary": len(table.pieces),
        "tokenizer_s": round(built, 3),
        "compile_ms": round(statistics.mean(compiled), 3),
        "mean_us": round(statistics.mean(micros), 1),
        **{f"p{p}_us": round(load.percentile(micros, p), 1) for p in (50, 99, 99.9)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="embedded:demo", help="a folder or a file")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = TextModel.load(_DEMO)
    record: dict[str, Any] = {
        "command": "python benchmarks/grammar.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "streams": STREAMS,
        "tokens": TOKENS,
    }
    record["mask"] = [masks(text.token_table()), masks(large_table(text))]
    with idle.Daemon(preload=True, model=arguments.model) as daemon:
        daemon.wait_for("/ready")
        url = f"http://127.0.0.1:{daemon.port}"
        for temperature in (0.0, 1.0):
            name = f"temperature {temperature:g}"
            record[name] = asyncio.run(compare(url, temperature, arguments.rounds))
    shown = json.dumps(record, indent=1)
    print(shown)
    if arguments.json:
        arguments.json.write_text(shown + "\n")


if __name__ == "__main__":
    main()
