"""A load client for servers that speak OpenAI's /v1/completions. Loopback only.

Prompts are lists of random token ids, seeded by scenario and repeat, so that no prompt is a prefix
of another's and a prefix cache cannot help unless the scenario shares one on purpose.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import zlib
from dataclasses import dataclass, field
from urllib.parse import urlparse

import aiohttp

TOKEN_IDS = range(300, 7900)
"""Ordinary tokens in every vocabulary that the benchmarks use."""


@dataclass(frozen=True)
class Scenario:
    """`streams` requests at once, each of `shared` + `prompt` prompt tokens and `output` tokens.

    `primed`: the shared tokens were sent once before, and that is not timed.
    """

    name: str
    streams: int
    prompt: int
    output: int
    shared: int = 0
    primed: bool = False

    def prompts(self, repeat: int) -> list[list[int]]:
        key = f"{self.name}/{self.streams}/{self.prompt}/{self.output}/{self.shared}/{repeat}"
        rng = random.Random(zlib.crc32(key.encode()))
        prefix = rng.choices(TOKEN_IDS, k=self.shared)
        return [prefix + rng.choices(TOKEN_IDS, k=self.prompt) for _ in range(self.streams)]


@dataclass
class Stream:
    """What one request saw; times in seconds since an arbitrary start."""

    start: float
    token_times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One scenario once. Rates are tokens per second, times milliseconds."""

    output_rate: float
    prefill_rate: float
    decode_rate: float
    ttft_mean: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    wall: float
    cached: int


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


async def complete(session: aiohttp.ClientSession, url: str, model: str, body: dict) -> Stream:
    stream = Stream(time.perf_counter())
    body = {
        "model": model,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            stream.error = f"{response.status} {(await response.text())[:300]}"
            return stream
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk.get("error"):
                stream.error = str(chunk["error"])
            if chunk.get("choices"):
                # A token may carry no text (half a character): it still counts as one.
                choice = chunk["choices"][0]
                if choice.get("text") or not choice.get("finish_reason"):
                    stream.token_times.append(now)
            if usage := chunk.get("usage"):
                stream.num_output_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                stream.num_cached_tokens = details.get("cached_tokens") or 0
    stream.end = time.perf_counter()
    return stream


async def run(url: str, model: str, scenario: Scenario, repeat: int) -> Measurement:
    """Run a scenario once. Raises RuntimeError if any of its requests failed."""
    if urlparse(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"only servers on this machine are measured, not {url}")
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        if scenario.primed:
            prefix = scenario.prompts(repeat)[0][: scenario.shared]
            await complete(session, url, model, {"prompt": prefix, "max_tokens": 1})
        start = time.perf_counter()
        streams = await asyncio.gather(
            *(
                complete(session, url, model, {"prompt": prompt, "max_tokens": scenario.output})
                for prompt in scenario.prompts(repeat)
            )
        )
        wall = time.perf_counter() - start
    failed = [stream.error for stream in streams if stream.error or not stream.token_times]
    if failed:
        raise RuntimeError(f"{scenario.name}: {len(failed)} requests failed: {failed[0]}")
    return _measurement(scenario, streams, wall)


def _measurement(scenario: Scenario, streams: list[Stream], wall: float) -> Measurement:
    waits = [stream.token_times[0] - stream.start for stream in streams]
    gaps = [
        after - before
        for stream in streams
        for before, after in zip(stream.token_times, stream.token_times[1:], strict=False)
    ]
    decodes = [
        (stream.num_output_tokens - 1) / (stream.token_times[-1] - stream.token_times[0])
        for stream in streams
        if stream.num_output_tokens > 1 and stream.token_times[-1] > stream.token_times[0]
    ]
    num_prompt_tokens = scenario.streams * scenario.prompt + scenario.shared
    return Measurement(
        output_rate=sum(stream.num_output_tokens for stream in streams) / wall,
        prefill_rate=num_prompt_tokens / max(waits),
        decode_rate=statistics.median(decodes) if decodes else 0.0,
        ttft_mean=1e3 * statistics.mean(waits),
        ttft_p99=1e3 * percentile(waits, 99),
        itl_p50=1e3 * percentile(gaps, 50),
        itl_p99=1e3 * percentile(gaps, 99),
        wall=wall,
        cached=sum(stream.num_cached_tokens for stream in streams),
    )
