"""Shared prefixes, tiers, budgets and timeouts through the real process (fp32, the embedded model).

Daemons are shared where a test leaves no more behind than cached blocks; prompts are then its own.
Random load over all tiers, a full disk among them: `test_soak.py`.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
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
    """All are there before the first is computed."""
    with ThreadPoolExecutor(len(requests)) as threads:
        with daemon.held():
            answers = [threads.submit(daemon.post, "/v1/completions", one) for one in requests]
            daemon.wait_requests(len(requests))
        return [answer.result() for answer in answers]


def started(*arguments: str) -> Iterator[Daemon]:
    with Daemon("demo", "--dtype", "float32", "--threads", "1", *arguments) as daemon:
        yield daemon


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


def listed(daemon: Daemon, num_files: int) -> None:
    """Until the worker has looked through the folder; a request waits for that a second only."""
    daemon.wait(lambda: state(daemon)["kv"]["disk_cached"] >= num_files)


def check_read_from_disk(daemon: Daemon, prompt: list[int], tokens: list[int]) -> None:
    """Whether a block is read goes by what reading has cost so far, which is too much where other
    programs were in the way; a model that is loaded again has measured nothing yet."""
    for _ in range(10):
        answer, cached = ask(daemon, prompt, len(tokens))
        assert answer == tokens
        if cached == len(prompt) // 16 * 16:
            return
        daemon.post("/admin/models/unload", {"model": "demo"}, unix=True)
        daemon.post("/admin/models/load", {"model": "demo"}, unix=True)
        listed(daemon, 1)
    raise AssertionError("it is never read from disk")


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
    listed(first, 3 * 13)
    first.stop(signal.SIGTERM)
    second = serve("demo", "--dtype", "float32", *arguments)
    listed(second, 3 * 13)
    for prompt, tokens in zip(PROMPTS[:3], expected, strict=True):
        check_read_from_disk(second, prompt, tokens)
    read = second.metric('quantd_spill_bytes_total{direction="in",tier="disk"}')
    assert read > 0
    second.post("/admin/models/unload", {"model": "demo"}, unix=True)
    for path in sorted((tmp_path / "kv").rglob("*.kv")):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    second.post("/admin/models/load", {"model": "demo"}, unix=True)
    listed(second, 3 * 13)
    assert [ask(second, prompt, 20)[0] for prompt in PROMPTS[:3]] == expected
    # What was damaged was not taken, and what was counted before the load was not forgotten.
    assert second.metric('quantd_spill_bytes_total{direction="in",tier="disk"}') == read
    assert "not what its name says" in second.said()


def test_those_who_come_together_after_a_restart_share_what_is_read(
    serve: Callable[..., Daemon], tmp_path: Path
) -> None:
    arguments = ["--dtype", "float32", "--threads", "1", "--host-kv-bytes", "32MiB"]
    arguments += ["--disk-kv-path", str(tmp_path / "kv")]
    first = serve("demo", *arguments)
    ask(first, PROMPTS[0], 1)
    listed(first, 12)
    first.stop(signal.SIGTERM)
    second = serve("demo", *arguments)
    listed(second, 12)
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
    for _ in range(10):
        if daemon.metric(free) == 0:
            break
        together(daemon, requests)  # its rest is over, and nobody has tried again
    else:
        raise AssertionError("nothing comes of what fails")
    assert state(daemon)["kv"]["disk_problem"].startswith(reason)
    files = Path(path)
    daemon.wait(lambda: state(daemon)["kv"]["disk_cached"] == len(list(files.glob("*/*.kv"))))
    daemon.wait(lambda: not list(files.glob("*/*.new")))
    assert reason in daemon.said()
    assert daemon.get("/admin/check", unix=True)[0] == 200
    assert state(daemon)["kv"]["used"] == 0


def test_a_timeout_is_an_error_that_names_it(daemon: Daemon) -> None:
    request = body(PROMPTS[0], 7000, timeout=0.2)
    status, _, data = daemon.request("POST", "/v1/completions", request)
    error = json.loads(data)["error"]
    assert (status, error["code"], error["param"]) == (422, "deadline_exceeded", "timeout")
    # By what the daemon knows of its own speed, it may say so before it begins.
    assert re.match(r"the timeout of 0\.2 s (is over: |cannot be met: )", error["message"])
    # It begins, if need be with more time, and cannot end.
    for seconds in (1, 2, 4, 8, 16):
        streamed = body(PROMPTS[0][:1], 7000, timeout=seconds, stream=True)
        status, _, data = daemon.request("POST", "/v1/completions", streamed)
        if status == 200:
            break
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
    with Daemon("--config", str(file)) as daemon:
        yield daemon, file


def test_callers_share_by_the_weights_of_the_configuration(
    configured: tuple[Daemon, Path],
) -> None:
    daemon, _ = configured
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=240)
    headers = {"Content-Type": "application/json", "x-api-key": "key-of-bob"}
    long = json.dumps(body(PROMPTS[0], 4000, stream=True))

    def one(number: int) -> tuple[str, str]:
        """(when the daemon has answered, by its own clock; who asked)"""
        caller = "alice" if number % 2 else "bob"
        options = {"num_predict": 8, "temperature": 0}
        asked = {"model": "demo", "prompt": f"What can you do? {number}", "options": options}
        key = {"x-api-key": f"key-of-{caller}"}
        sent = asked | {"stream": False}
        status, _, data = daemon.request("POST", "/api/generate", sent, **key)
        answer = json.loads(data)
        assert (status, answer["eval_count"]) == (200, 8), data
        return answer["created_at"], caller

    with ThreadPoolExecutor(24) as threads:
        with daemon.held():
            connection.request("POST", "/v1/completions", long, headers)
            daemon.wait_metric("quantd_requests_running", 1)
            futures = [threads.submit(one, number) for number in range(24)]
            daemon.wait_requests(25)
            connection.close()
            daemon.wait_requests(24)
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
