"""The commands as a user types them, against a real daemon."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon

pytestmark = pytest.mark.xdist_group("cli")

DEMO = '[models.demo]\npath = "embedded:demo"\ndtype = "float32"\nthreads = 1\n'
SPARE = DEMO.replace("models.demo", "models.spare") + "preload = false\n"
QUESTION = "Sort these numbers: 42, 7, 19"
SHORT = ("--temperature", "0", "--max-tokens", "8")


def quantd(*arguments: object, piped: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with `piped` as its input, or without any."""
    return subprocess.run(
        [sys.executable, "-m", "quantd.daemon", *map(str, arguments)],
        stdin=subprocess.DEVNULL if piped is None else None,
        input=piped,
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def succeeds(*arguments: object, piped: str | None = None) -> str:
    done = quantd(*arguments, piped=piped)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fails(status: int, *arguments: object, piped: str | None = None) -> str:
    """The one line that says why."""
    done = quantd(*arguments, piped=piped)
    assert (done.returncode, done.stdout) == (status, ""), done
    [line] = done.stderr.splitlines()
    assert line.startswith("quantd: ")
    return line.removeprefix("quantd: ")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(DEMO + SPARE)
    return file


@pytest.fixture(scope="module")
def daemon(config: Path) -> Iterator[Daemon]:
    with Daemon("--config", str(config)) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert not daemon.socket.exists()


@pytest.fixture(scope="module")
def at(daemon: Daemon) -> tuple[str, str]:
    return "--socket", str(daemon.socket)


def answer(daemon: Daemon, content: str) -> str:
    """What `run` with SHORT prints for this prompt."""
    messages = [{"role": "user", "content": content}]
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 8}
    text = daemon.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return f"{text}\n"


def test_version() -> None:
    assert succeeds("--version") == f"quantd {importlib.metadata.version('quantd')}\n"


def test_without_a_command_it_says_so_in_one_line() -> None:
    done = quantd()
    assert done.returncode == 2
    assert done.stderr == "quantd: the following arguments are required: COMMAND\n"


def test_completion_for_bash() -> None:
    script = succeeds("completion", "bash")
    asked = "COMP_WORDS=(quantd check); COMP_CWORD=1; _quantd; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["check", "check-config"], "")


# --- a running daemon ------------------------------------------------------------------------


def test_ps(daemon: Daemon, at: tuple[str, str]) -> None:
    header, *rows = succeeds("ps", *at).splitlines()
    assert header.split()[:2] == ["MODEL", "STATE"]
    assert [row.split()[:2] for row in rows] == [["demo", "ready"], ["spare", "cold"]]
    demo, spare = json.loads(succeeds("ps", "--json", *at))
    assert demo["name"] == "demo" and demo["state"] == "ready"
    assert demo["stats"]["running"] == demo["stats"]["waiting"] == 0
    assert demo["info"]["max_context"] == 8192
    assert spare["state"] == "cold" and spare["stats"] is None
    over_tcp = succeeds("ps", "--port", daemon.port).splitlines()
    assert [row.split()[:2] for row in over_tcp[1:]] == [["demo", "ready"], ["spare", "cold"]]


def test_ps_where_nothing_runs(tmp_path: Path) -> None:
    line = fails(1, "ps", "--socket", tmp_path / "no.sock")
    assert line.startswith(f"no daemon is running at {tmp_path}/no.sock")


def test_run_asks_the_running_daemon(daemon: Daemon, at: tuple[str, str]) -> None:
    expected = answer(daemon, QUESTION)
    assert succeeds("run", "demo", QUESTION, *SHORT, *at) == expected
    assert succeeds("run", QUESTION, *SHORT, *at) == expected
    assert succeeds("run", "demo", QUESTION, *SHORT, "--port", daemon.port) == expected


def test_run_takes_what_is_piped_in(daemon: Daemon, at: tuple[str, str]) -> None:
    assert succeeds("run", "demo", *SHORT, *at, piped=f"{QUESTION}\n") == answer(daemon, QUESTION)
    both = answer(daemon, "Sort these\n\n3 1 2")
    assert succeeds("run", "demo", "Sort these", *SHORT, *at, piped="3 1 2\n") == both
    assert "no prompt" in fails(2, "run", "demo", *at, piped="")


def test_run_says_what_is_wrong(at: tuple[str, str]) -> None:
    assert "maximum context" in fails(1, "run", "demo", QUESTION, "--max-tokens", 100_000, *at)
    assert "temperature" in fails(1, "run", "demo", QUESTION, "--temperature", "-1", *at)
    assert "nosuch" in fails(1, "run", "nosuch", QUESTION, *at)


def test_load_and_unload(daemon: Daemon, at: tuple[str, str]) -> None:
    def states() -> dict[str, str]:
        return {
            model["name"]: model["state"] for model in json.loads(succeeds("ps", "--json", *at))
        }

    assert succeeds("load", "spare", *at) == "spare: ready\n"
    assert states() == {"demo": "ready", "spare": "ready"}
    assert len(daemon.workers()) == 2
    assert succeeds("unload", "spare", *at) == "spare: cold\n"
    assert states() == {"demo": "ready", "spare": "cold"}
    assert len(daemon.workers()) == 1
    assert "'nosuch' does not exist" in fails(1, "load", "nosuch", *at)
    assert "Unix socket only" in fails(1, "load", "spare", "--port", daemon.port)


# --- a daemon for one call -------------------------------------------------------------------


def test_run_starts_a_daemon_where_none_runs(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[server]\nsocket = "{tmp_path}/no.sock"\nport = 1\n{DEMO}')
    ask = ("run", "--config", file, "demo", QUESTION, *SHORT)
    assert succeeds(*ask) == answer(daemon, QUESTION)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    file.write_text(file.read_text().replace("embedded:demo", "nowhere"))
    assert "nowhere" in fails(1, *ask)


# --- configuration ---------------------------------------------------------------------------


def test_check_config(config: Path) -> None:
    printed = succeeds("check-config", "--config", config)
    models = tomllib.loads(printed)["models"]
    assert models["demo"]["dtype"] == "float32" and models["spare"]["preload"] is False
    assert f"# {config}" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nport = 70000\n", ["server.port", "70000"]),
        ("[server]\nprot = 1\n", ["server.prot", "port"]),
        ("[scheduler]\npolicy = 'lifo'\n", ["scheduler.policy", "lifo", "fcfs"]),
        ("[models.a]\ndtype = 'auto'\n", ["models.a", "path"]),
        ("[server\n", ["line 1"]),
    ],
)
def test_check_config_refuses_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    line = fails(2, "check-config", "--config", file)
    assert str(file) in line
    for word in words:
        assert word in line
    assert fails(2, "serve", "--config", file) == line


def names(daemon: Daemon) -> list[str]:
    return [model["id"] for model in json.loads(daemon.get("/v1/models")[1])["data"]]


def test_reload(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(DEMO)
    daemon = serve("--config", str(file))
    at = ("--socket", daemon.socket)
    assert succeeds("reload", *at) == "nothing has changed\n"

    file.write_text(DEMO + SPARE)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: names(daemon) == ["demo", "spare"])

    file.write_text("[scheduler]\npolicy = 'lifo'\n")
    assert "lifo" in fails(1, "reload", *at)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: daemon.said().count("reload refused") == 2)
    assert names(daemon) == ["demo", "spare"]

    file.write_text(DEMO)
    assert "spare" in succeeds("reload", *at)
    assert names(daemon) == ["demo"]
    [worker] = daemon.workers()  # the demo went on through all of it
    assert len(re.findall(rf'"pid":{worker}\b', daemon.said())) == 1


# --- sockets ---------------------------------------------------------------------------------


def test_a_second_daemon_is_refused(daemon: Daemon, at: tuple[str, str]) -> None:
    line = fails(2, "serve", "demo", "--port", 0, *at)
    assert line == f"cannot listen on {daemon.socket}: another daemon listens there"
    line = fails(2, "serve", "demo", "--port", daemon.port, "--socket", daemon.folder / "b.sock")
    assert line == f"cannot listen on 127.0.0.1:{daemon.port}: Address already in use"
    assert daemon.get("/health", unix=True)[0] == 200


def test_a_dead_daemons_socket_is_replaced(serve: Callable[..., Daemon]) -> None:
    options: dict[str, Any] = {"wait_ready": False}
    dead = serve("demo", **options)
    assert dead.stop(signal.SIGKILL) == -signal.SIGKILL
    assert dead.socket.is_socket()
    daemon = serve("demo", folder=dead.folder, **options)
    assert daemon.get("/health", unix=True)[0] == 200
