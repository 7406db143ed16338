"""Shared prefixes, tiers, budgets and timeouts through the real process (fp32, the embedded model).

Daemons are shared where a test leaves no more behind than cached blocks; prompts are then its own.
Random load over all tiers, a full disk among them: `test_soak.py`.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soak
from harness import Daemon

pytestmark = pytest.mark.xdist_group("kv")  # or each worker would start the shared daemons

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


def started(*arguments: str) -> Iterator[Daemon]:
    daemon = Daemon("demo", "--dtype", "float32", "--threads", "1", *arguments)
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def plain() -> Iterator[Daemon]:
    """The oracle: nothing shared, nothing planned ahead."""
    yield from started("--prefix-cache", "false", "--overlap", "false")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """With everything as it is by default."""
    yield from started()


def state(daemon: Daemon) -> dict[str, Any]:
    status, data = daemon.get("/admin/state", unix=True)
    assert status == 200
    engine: dict[str, Any] = json.loads(data)["engines"]["demo"]
    return engine


def test_cached_is_uncached_and_usage_says_how_much(daemon: Daemon, plain: Daemon) -> None:
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
    daemon: Daemon, plain: Daemon
) -> None:
    before = daemon.metric("quantd_prefix_hit_tokens_total")
    requests = [body([*PROMPTS[2], i + 30, *PROMPTS[3][:20]], 6) for i in range(12)]
    expected = [plain.post("/v1/completions", one) for one in requests]
    answers = together(daemon, requests)
    said = [answer["choices"][0]["token_ids"] for answer in answers]
    assert said == [answer["choices"][0]["token_ids"] for answer in expected]
    cached = sorted(a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers)
    assert cached == [0, *[192] * 11]
    assert daemon.metric("quantd_prefix_hit_tokens_total") - before == 192 * 11
    several = daemon.post("/v1/completions", body(PROMPTS[4][:40], 9, n=3, seed=5, temperature=1))
    assert several["usage"]["prompt_tokens"] == 40
    alone = plain.post("/v1/completions", body(PROMPTS[4][:40], 9, n=3, seed=5, temperature=1))
    assert [c["token_ids"] for c in several["choices"]] == [
        c["token_ids"] for c in alone["choices"]
    ]


def test_spilled_blocks_return_as_they_were(serve: Callable[..., Daemon], plain: Daemon) -> None:
    arguments = ["--kv-bytes", "2MiB", "--host-kv-bytes", "32MiB", "--max-context", "400"]
    daemon = serve("demo", "--dtype", "float32", "--threads", "1", *arguments)
    expected = [ask(plain, prompt, 40)[0] for prompt in PROMPTS]
    for _ in range(2):
        answers = together(daemon, [body(prompt, 40) for prompt in PROMPTS])
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
    assert daemon.metric('quantd_spill_bytes_total{direction="out",tier="host"}') > 0
    now = state(daemon)
    assert now["kv"]["moved_blocks"]["out_host"] > 0
    assert now["kv"]["fetches"] + now["kv"]["recomputes"] > 0
    assert (now["kv"]["used"], now["running"], now["requests"]) == (0, 0, [])


def test_the_disk_tier_survives_a_restart(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    arguments = [
        "--host-kv-bytes",
        "32MiB",
        "--disk-kv-path",
        str(tmp_path / "kv"),
        "--threads",
        "1",
    ]
    first = serve("demo", "--dtype", "float32", *arguments)
    expected = [ask(first, prompt, 20)[0] for prompt in PROMPTS[:3]]
    first.wait(lambda: state(first)["kv"]["disk_cached"] >= 3 * 13)
    first.stop(signal.SIGTERM)
    second = serve("demo", "--dtype", "float32", *arguments)
    # The first request waits until the folder was looked through.
    for prompt, tokens in zip(PROMPTS[:3], expected, strict=True):
        assert ask(second, prompt, 20) == (tokens, 192)
    read = second.metric('quantd_spill_bytes_total{direction="in",tier="disk"}')
    assert read > 0
    second.post("/admin/models/unload", {"model": "demo"}, unix=True)
    for path in sorted((tmp_path / "kv").rglob("*.kv")):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    second.post("/admin/models/load", {"model": "demo"}, unix=True)
    second.wait(lambda: state(second)["kv"]["disk_cached"] >= 3 * 13)
    assert [ask(second, prompt, 20)[0] for prompt in PROMPTS[:3]] == expected
    # What was damaged was not taken, and what was counted before the load was not forgotten.
    assert second.metric('quantd_spill_bytes_total{direction="in",tier="disk"}') == read
    assert "not what its name says" in second.log.read_text()


def test_those_who_come_together_after_a_restart_share_what_is_read(
    serve: Callable[..., Daemon], tmp_path: Path
) -> None:
    arguments = ["--dtype", "float32", "--threads", "1", "--host-kv-bytes", "32MiB"]
    arguments += ["--disk-kv-path", str(tmp_path / "kv")]
    first = serve("demo", *arguments)
    ask(first, PROMPTS[0], 1)
    first.wait(lambda: state(first)["kv"]["disk_cached"] >= 12)
    first.stop(signal.SIGTERM)
    second = serve("demo", *arguments)
    prompts = [[*PROMPTS[0][:192], *range(20 + i, 30 + i)] for i in range(4)]
    answers = together(second, [body(prompt, 20) for prompt in prompts])
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [192] * 4
    assert state(second)["kv"]["moved_blocks"]["in_disk"] == 12
    alone = serve("demo", "--dtype", "float32", "--threads", "1", "--prefix-cache", "false")
    expected = [ask(alone, prompt, 20)[0] for prompt in prompts]
    assert [answer["choices"][0]["token_ids"] for answer in answers] == expected


@pytest.fixture(params=["full", "no folder"])
def failing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(a place for files of blocks, why writing there fails)"""
    if request.param == "no folder":
        (tmp_path / "file").touch()
        yield str(tmp_path / "file" / "kv"), "NotADirectoryError: "
        return
    with soak.small_disk(tmp_path / "disk") as disk:
        if "full" not in disk:
            pytest.skip(disk)
        yield str(tmp_path / "disk" / "kv"), "OSError: [Errno 28] No space left on device"


def test_a_disk_that_fails_is_told_and_costs_no_answer(
    serve: Callable[..., Daemon], plain: Daemon, failing: tuple[str, str]
) -> None:
    path, reason = failing
    arguments = ["--kv-bytes", "2MiB", "--max-context", "400", "--host-kv-bytes", "3MiB"]
    arguments += ["--dtype", "float32", "--threads", "1", "--disk-kv-path", path]
    daemon = serve("demo", *arguments)
    free = 'quantd_kv_blocks{tier="disk",state="free"}'
    requests = [body(prompt, 10) for prompt in PROMPTS[:6]]
    expected = [ask(plain, prompt, 10)[0] for prompt in PROMPTS[:6]]
    for _ in range(2):  # the second time beside a disk that is known to fail
        answers = together(daemon, requests)
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        daemon.wait(lambda: state(daemon)["kv"]["disk_problem"])
    assert state(daemon)["kv"]["disk_problem"].startswith(reason)
    daemon.wait_metric(free, 0)
    files = Path(path)
    daemon.wait(lambda: state(daemon)["kv"]["disk_cached"] == len(list(files.glob("*/*.kv"))))
    assert not list(files.glob("*/*.new"))
    assert reason in daemon.log.read_text()
    assert daemon.get("/admin/check", unix=True)[0] == 200
    assert state(daemon)["kv"]["used"] == 0


def test_a_timeout_is_an_error_that_names_it(daemon: Daemon) -> None:
    request = body(PROMPTS[0], 7000, timeout=0.2)
    status, _, data = daemon.request("POST", "/v1/completions", request)
    error = json.loads(data)["error"]
    assert (status, error["code"], error["param"]) == (422, "deadline_exceeded", "timeout")
    # By what the daemon knows of its own speed, it may say so before it begins.
    assert re.match(r"the timeout of 0\.2 s (is over: |cannot be met: )", error["message"])
    streamed = body(PROMPTS[0][:1], 7000, timeout=1, stream=True)  # it begins, and cannot end
    status, _, data = daemon.request("POST", "/v1/completions", streamed)
    assert status == 200 and b'"deadline_exceeded"' in data and data.endswith(b"[DONE]\n\n")
    for wrong in (0, -1, 1e9):
        status, _, data = daemon.request("POST", "/v1/completions", request | {"timeout": wrong})
        assert (status, json.loads(data)["error"]["param"]) == (400, "timeout")
    daemon.wait(lambda: state(daemon)["kv"]["used"] == 0)


def test_an_unloaded_model_has_forgotten_its_blocks(daemon: Daemon, plain: Daemon) -> None:
    prompt = PROMPTS[5][:100]
    expected = ask(plain, prompt, 5)[0]
    assert ask(daemon, prompt, 5) == (expected, 0)
    assert ask(daemon, prompt, 5) == (expected, 96)
    daemon.post("/admin/models/unload", {"model": "demo"}, unix=True)
    assert ask(daemon, prompt, 5) == (expected, 0)


CONFIGURED = """
[server]
api_keys_file = "keys"
[scheduler]
max_running = 1
caller_weights = { alice = 3, bob = 1 }
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
max_context = 8192
kv_bytes = "64MiB"
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """(a daemon with keys and weights, its configuration)"""
    file = tmp_path_factory.mktemp("configured") / "config.toml"
    (file.parent / "keys").write_text("alice:key-of-alice\nbob:key-of-bob\n")
    file.write_text(CONFIGURED)
    daemon = Daemon("--config", str(file), wait_ready=True)
    yield daemon, file
    daemon.stop()


def test_callers_share_by_the_weights_of_the_configuration(
    configured: tuple[Daemon, Path],
) -> None:
    daemon, _ = configured
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    headers = {"Content-Type": "application/json", "x-api-key": "key-of-bob"}
    long = json.dumps(body(PROMPTS[0], 4000, stream=True))
    connection.request("POST", "/v1/completions", long, headers)
    daemon.wait_metric("quantd_requests_running", 1)

    def one(number: int) -> tuple[float, str]:
        caller = "alice" if number % 2 else "bob"
        prompt = PROMPTS[number % 12][: 40 + number]
        key = {"x-api-key": f"key-of-{caller}"}
        status, _, data = daemon.request("POST", "/v1/completions", body(prompt, 8), **key)
        assert status == 200, data
        return time.monotonic(), caller

    with ThreadPoolExecutor(24) as threads:
        futures = [threads.submit(one, number) for number in range(24)]
        daemon.wait_metric("quantd_requests_waiting", 24)
        connection.close()
        ended = [caller for _, caller in sorted(future.result() for future in futures)]
    # By what they have computed: three tokens of alice's for each of bob's, who begins behind.
    assert ended[:12].count("alice") >= 8, ended
    daemon.wait_metric("quantd_requests_running", 0)


def test_the_budget_changes_while_it_runs(configured: tuple[Daemon, Path]) -> None:
    daemon, file = configured

    def of_unix(request: dict[str, Any]) -> Any:
        return daemon.post("/v1/completions", request, unix=True)["choices"][0]["token_ids"]

    def blocks() -> int:
        kv = state(daemon)["kv"]
        return int(kv["free"] + kv["used"] + kv["cached"])

    before = of_unix(body(PROMPTS[0], 30))
    block, worker = state(daemon)["kv"]["block_bytes"], daemon.workers()
    kv = daemon.post("/admin/kv", {"model": "demo", "kv_bytes": 30 * block}, unix=True)
    assert kv["free"] + kv["cached"] == 30
    assert of_unix(body(PROMPTS[0], 30)) == before
    status, _, data = daemon.request("POST", "/v1/completions", body([30] * 390, 200), unix=True)
    assert (status, json.loads(data)["error"]["code"]) == (400, "kv_cache_too_small")
    kv = daemon.post("/admin/kv", {"model": "demo", "kv_bytes": "32MiB", "shrink": True}, unix=True)
    assert (kv["cached"], kv["free"]) == (0, (32 << 20) // block)
    for wrong in (5, "5", "32MB"):
        status, _, data = daemon.request(
            "POST", "/admin/kv", {"model": "demo", "kv_bytes": wrong}, unix=True
        )
        assert (status, json.loads(data)["error"]["param"]) == (400, "kv_bytes")

    file.write_text(CONFIGURED.replace("64MiB", "16MiB"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: blocks() == (16 << 20) // block)
    file.write_text(CONFIGURED)
    assert daemon.post("/admin/reload", None, unix=True)["changes"] == ["model demo has changed"]
    assert blocks() == (64 << 20) // block
    assert of_unix(body(PROMPTS[0], 30)) == before
    assert daemon.workers() == worker, "nothing was loaded again"
