"""Shared prefixes, tiers and timeouts through the real process (fp32, the embedded model)."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon

PROMPTS = [[(i * 37 + j * (i % 5 + 1)) % 900 + 20 for j in range(200)] for i in range(12)]


def body(prompt: list[int], max_tokens: int = 8, **extra: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }


def ask(daemon: Daemon, *arguments: Any, **extra: Any) -> tuple[list[int], int]:
    """(tokens, cached tokens)"""
    answer = daemon.post("/v1/completions", body(*arguments, **extra))
    (choice,) = answer["choices"]
    return choice["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def together(daemon: Daemon, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda one: daemon.post("/v1/completions", one), requests))


@pytest.fixture
def plain(serve: Callable[..., Daemon]) -> Daemon:
    """The oracle: nothing shared, nothing planned ahead."""
    return serve("demo", "--dtype", "float32", "--prefix-cache", "false", "--overlap", "false")


def state(daemon: Daemon) -> dict[str, Any]:
    status, data = daemon.get("/admin/state", unix=True)
    assert status == 200
    engine: dict[str, Any] = json.loads(data)["engines"]["demo"]
    return engine


def test_cached_is_uncached_and_usage_says_how_much(
    serve: Callable[..., Daemon], plain: Daemon
) -> None:
    daemon = serve("demo", "--dtype", "float32")
    for length in (15, 16, 17, 32, 100):
        prompt = PROMPTS[0][:length]
        expected, none = ask(plain, prompt, 20)
        assert none == 0
        first, _ = ask(daemon, prompt, 20, cache_salt=str(length))
        again, cached = ask(daemon, prompt, 20, cache_salt=str(length))
        assert first == again == expected
        # A known prompt computes one token at least: of a whole last block just that one.
        assert cached == (length - 1 if length % 16 == 0 else length // 16 * 16)
        _, other = ask(daemon, prompt, 20, cache_salt="other" + str(length))
        assert other == 0
    turn = [*PROMPTS[1][:50], *ask(daemon, PROMPTS[1][:50], 30)[0]]
    assert ask(daemon, [*turn, 7, 8], 5)[1] == 64


def test_a_burst_shares_its_prefix_and_n_choices_their_prompt(
    serve: Callable[..., Daemon], plain: Daemon
) -> None:
    daemon = serve("demo", "--dtype", "float32")
    requests = [body([*PROMPTS[2], i + 30, *PROMPTS[3][:20]], 6) for i in range(12)]
    expected = [plain.post("/v1/completions", one) for one in requests]
    answers = together(daemon, requests)
    said = [answer["choices"][0]["token_ids"] for answer in answers]
    assert said == [answer["choices"][0]["token_ids"] for answer in expected]
    cached = sorted(a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers)
    assert cached == [0, *[192] * 11]
    assert daemon.metric("quantd_prefix_hit_tokens_total") == 192 * 11
    several = daemon.post("/v1/completions", body(PROMPTS[4][:40], 9, n=3, seed=5, temperature=1))
    assert several["usage"]["prompt_tokens"] == 40
    alone = plain.post("/v1/completions", body(PROMPTS[4][:40], 9, n=3, seed=5, temperature=1))
    assert [c["token_ids"] for c in several["choices"]] == [
        c["token_ids"] for c in alone["choices"]
    ]


def test_spilled_blocks_return_as_they_were(serve: Callable[..., Daemon], plain: Daemon) -> None:
    arguments = ["--kv-bytes", "2MiB", "--host-kv-bytes", "32MiB", "--max-context", "400"]
    daemon = serve("demo", "--dtype", "float32", *arguments)
    expected = [ask(plain, prompt, 40)[0] for prompt in PROMPTS]
    for _ in range(3):
        answers = together(daemon, [body(prompt, 40) for prompt in PROMPTS])
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
    assert daemon.metric('quantd_spill_bytes_total{direction="out",tier="host"}') > 0
    now = state(daemon)
    assert now["kv"]["moved_blocks"]["out_host"] > 0
    assert now["kv"]["fetches"] + now["kv"]["recomputes"] > 0
    assert (now["kv"]["used"], now["running"], now["requests"]) == (0, 0, [])


def test_the_disk_tier_survives_a_restart(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    arguments = ["--host-kv-bytes", "32MiB", "--disk-kv-path", str(tmp_path / "kv")]

    def start() -> Daemon:
        return serve("demo", "--dtype", "float32", *arguments)

    first = start()
    expected = [ask(first, prompt, 20)[0] for prompt in PROMPTS[:3]]
    first.wait(lambda: state(first)["kv"]["disk_cached"] >= 3 * 13)
    first.stop(signal.SIGTERM)
    second = start()
    for prompt, tokens in zip(PROMPTS[:3], expected, strict=True):
        assert ask(second, prompt, 20) == (tokens, 192)
    assert second.metric('quantd_spill_bytes_total{direction="in",tier="disk"}') > 0
    second.stop(signal.SIGTERM)
    files = sorted((tmp_path / "kv").rglob("*.kv"))
    for path in files:
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    third = start()
    assert [ask(third, prompt, 20)[0] for prompt in PROMPTS[:3]] == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_no_answer(serve: Callable[..., Daemon], small_disk: Path) -> None:
    arguments = ["--host-kv-bytes", "32MiB", "--disk-kv-path", str(small_disk / "kv")]
    daemon = serve("demo", "--dtype", "float32", *arguments)
    first = [ask(daemon, prompt, 10)[0] for prompt in PROMPTS]
    daemon.wait(lambda: state(daemon)["kv"]["disk_problem"] is not None)
    assert "No space left" in state(daemon)["kv"]["disk_problem"]
    assert [ask(daemon, prompt, 10)[0] for prompt in PROMPTS] == first
    assert not list(small_disk.rglob("*.new"))


def test_a_timeout_is_an_error_that_names_it(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--dtype", "float32")
    request = body(PROMPTS[0], 7000, timeout=0.2)
    status, _, data = daemon.request("POST", "/v1/completions", request)
    error = json.loads(data)["error"]
    assert (status, error["code"], error["param"]) == (422, "deadline_exceeded", "timeout")
    assert error["message"].startswith("the timeout of 0.2 s is over: ")
    status, _, data = daemon.request("POST", "/v1/completions", request | {"stream": True})
    assert status == 200 and b'"deadline_exceeded"' in data and data.endswith(b"[DONE]\n\n")
    for wrong in (0, -1, 1e9):
        status, _, data = daemon.request("POST", "/v1/completions", request | {"timeout": wrong})
        assert (status, json.loads(data)["error"]["param"]) == (400, "timeout")
    daemon.wait(lambda: state(daemon)["kv"]["used"] == 0)


def test_the_budget_changes_while_it_runs(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--dtype", "float32", "--kv-bytes", "16MiB", "--max-context", "400")
    before, _ = ask(daemon, PROMPTS[0], 30)
    block = state(daemon)["kv"]["block_bytes"]
    kv = daemon.post("/admin/kv", {"model": "demo", "kv_bytes": 30 * block}, unix=True)
    assert kv["free"] + kv["cached"] == 30
    assert ask(daemon, PROMPTS[0], 30)[0] == before
    status, _, data = daemon.request("POST", "/v1/completions", body([30] * 390, 200))
    assert status == 400
    kv = daemon.post(
        "/admin/kv", {"model": "demo", "kv_bytes": 64 << 20, "shrink": True}, unix=True
    )
    assert (kv["cached"], kv["free"]) == (0, (64 << 20) // block)
    status, _, data = daemon.request(
        "POST", "/admin/kv", {"model": "demo", "kv_bytes": 5}, unix=True
    )
    assert (status, json.loads(data)["error"]["param"]) == (400, "kv_bytes")


def test_random_load_over_all_tiers(
    serve: Callable[..., Daemon], plain: Daemon, tmp_path: Path
) -> None:
    """Every answer that was not timed out is what it is alone; then nothing is held."""
    arguments = ["--kv-bytes", "3MiB", "--host-kv-bytes", "2MiB", "--max-context", "400"]
    arguments += ["--disk-kv-path", str(tmp_path / "kv"), "--disk-kv-bytes", "4MiB"]
    arguments += ["--policy", "priority", "--max-running", "6"]
    daemon = serve("demo", "--dtype", "float32", *arguments)
    rng = random.Random(3)
    requests = [
        body(
            [*PROMPTS[rng.randrange(4)][: rng.randint(1, 200)], rng.randint(20, 40)],
            rng.randint(1, 40),
            priority=rng.randint(0, 2),
            **({"timeout": 0.05} if rng.random() < 0.1 else {}),
        )
        for _ in range(60)
    ]

    def run(one: dict[str, Any]) -> tuple[int, Any]:
        status, _, data = daemon.request("POST", "/v1/completions", one)
        return status, json.loads(data)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(run, requests))
    for one, (status, answer) in zip(requests, answers, strict=True):
        if status == 422:
            assert "timeout" in one
            continue
        assert status == 200, answer
        alone = plain.post("/v1/completions", {k: v for k, v in one.items() if k != "timeout"})
        assert answer["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    daemon.wait(lambda: state(daemon)["kv"]["used"] == 0)
    assert state(daemon)["requests"] == []
