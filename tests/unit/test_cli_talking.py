"""Commands against a daemon: real process and sockets, workers of plain Python."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "fixtures/fake_daemon.py"


class Daemon:
    """A daemon that serves `ok`, `stuck`, `broken` and `thinks`, none of them preloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "q.sock"
        config = folder / "config.toml"
        tables = "".join(
            f"[models.{name}]\npath = '{name}'\npreload = false\n"
            for name in ("ok", "stuck", "broken", "thinks")
        )
        config.write_text(f"{tables}\n[models.ok2]\npath = 'ok'\naliases = ['second']\n")
        self.config = config
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), "serve", "--config", str(config), "--port", "0"]
            + ["--socket", str(self.socket), "--drain-seconds", "0"],
            stderr=writing,
            stdin=subprocess.DEVNULL,
        )
        os.close(writing)
        with open(reading) as log:
            line = next(line for line in log if "listening on" in line)
        self.port = int(line.split("http://127.0.0.1:")[1].split()[0])

    def quantd(self, *arguments: str, stdin: str = "", tcp: bool = False) -> tuple[int, str, str]:
        where = ["--port", str(self.port)] if tcp else ["--socket", str(self.socket)]
        done = subprocess.run(
            [sys.executable, "-m", "quantd.daemon", *arguments, *where],
            input=stdin,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(240)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.stop()


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_load_ps_unload(daemon: Daemon) -> None:
    assert daemon.quantd("load", "ok") == (0, "ok: ready\n", "")
    status, out, err = daemon.quantd("ps")
    assert (status, err) == (0, "")
    assert rows(out)["MODEL"][:3] == ["MODEL", "STATE", "WEIGHTS"]
    assert rows(out)["ok"][1] == "ready"
    assert rows(out)["ok"][-2:] == ["0", "0"]
    assert rows(out)["broken"][1] == "cold"
    assert daemon.quantd("unload", "ok") == (0, "ok: cold\n", "")
    assert rows(daemon.quantd("ps")[1])["ok"][1] == "cold"


def test_a_model_that_fails_shows_why(daemon: Daemon) -> None:
    status, out, err = daemon.quantd("load", "broken")
    assert (status, out) == (1, "")
    assert err.startswith("quantd: ") and err.count("\n") == 1
    assert "no tensor of this checkpoint makes sense" in err
    status, out, err = daemon.quantd("ps")
    assert rows(out)["broken"][1] == "failed"
    assert "broken: no tensor of this checkpoint makes sense" in out


def test_ps_as_json_and_over_tcp(daemon: Daemon) -> None:
    status, out, _ = daemon.quantd("ps", "--json")
    assert status == 0
    assert [model["name"] for model in json.loads(out)] == [
        "ok",
        "stuck",
        "broken",
        "thinks",
        "ok2",
    ]
    status, out, _ = daemon.quantd("ps", tcp=True)
    assert rows(out)["stuck"][1] == "cold"


def test_administration_needs_the_socket(daemon: Daemon) -> None:
    status, _, err = daemon.quantd("load", "ok", tcp=True)
    assert status == 1
    assert "over its Unix socket only" in err


def test_an_unknown_model(daemon: Daemon) -> None:
    status, _, err = daemon.quantd("load", "nope")
    assert status == 1
    assert "'nope'" in err and err.count("\n") == 1


def test_reload(daemon: Daemon) -> None:
    assert daemon.quantd("reload") == (0, "nothing has changed\n", "")
    before = daemon.config.read_text()
    daemon.config.write_text("[log]\nlevl = 1\n")
    status, _, err = daemon.quantd("reload")
    assert status == 1
    assert err == f"quantd: {daemon.config}:2: unknown key log.levl; did you mean 'level'?\n"
    daemon.config.write_text(before + "[models.later]\npath = 'ok'\npreload = false\n")
    assert daemon.quantd("reload") == (0, "model later is new\n", "")
    daemon.config.write_text(before)
    assert daemon.quantd("reload") == (0, "model later is gone\n", "")


def test_run_streams_an_answer(daemon: Daemon) -> None:
    status, out, err = daemon.quantd("run", "ok", "hello there", "--max-tokens", "8", "--seed", "1")
    assert (status, err) == (0, "")
    assert len(out) == 9 and out.endswith("\n") and out[:-1].isalpha()
    again = daemon.quantd("run", "ok", "hello there", "--max-tokens", "8", "--seed", "1")
    assert again[1] == out
    alias = daemon.quantd("run", "second", "hello there", "--max-tokens", "8", "--seed", "1")
    assert alias[1] == out
    over_tcp = daemon.quantd(
        "run", "ok", "hello there", "--max-tokens", "8", "--seed", "1", tcp=True
    )
    assert over_tcp[1] == out


def test_run_takes_what_is_piped_in(daemon: Daemon) -> None:
    def answer(*arguments: str, stdin: str = "") -> str:
        status, out, err = daemon.quantd(
            "run", *arguments, "--max-tokens", "8", "--seed", "1", stdin=stdin
        )
        assert status == 0, err
        return out

    assert answer("ok", stdin="a question\n") == answer("ok", "a question")
    assert answer("ok", "look:", stdin="text\n") == answer("ok", "look:\n\ntext")
    assert answer("only a prompt") == answer("ok", "only a prompt"), "the first model is meant"
    assert answer("ok", "a question", "--system", "be brief") != answer("ok", "a question")


def test_reasoning_is_for_who_watches(daemon: Daemon) -> None:
    status, out, err = daemon.quantd("run", "thinks", "hi")
    assert (status, out, err) == (0, "yes\n", "")
    terminal = Terminal("run", "thinks", "hi", "--socket", str(daemon.socket))
    assert terminal.until("yes").split() == ["why"]
    assert terminal.wait() == 0


def test_run_says_what_is_wrong(daemon: Daemon) -> None:
    status, _, err = daemon.quantd("run", "ok")
    assert (status, err) == (2, "quantd: there is no prompt: the input is empty\n")
    status, _, err = daemon.quantd("run", "broken", "hi")
    assert status == 1
    assert "no tensor of this checkpoint makes sense" in err
    status, _, err = daemon.quantd("run", "ok", "hi", "--max-tokens", "0")
    assert status == 1
    assert "max_tokens" in err and err.count("\n") == 1


class Terminal:
    """`quantd run` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        # Not pty.fork: a child of a process that has reserved much address space may be refused.
        self.master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quantd.daemon", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.text = ""
        self._bytes = b""

    def until(self, wanted: str) -> str:
        """Everything up to `wanted` since the last call."""
        while wanted not in self.text:
            self.read()
        before, _, self.text = self.text.partition(wanted)
        return before

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, again until something happens: one that comes after the prompt is
        written and before the program reads is seen only when it has read."""
        while True:
            self.send_interrupt()
            if select.select([self.master], [], [], 1)[0]:
                return

    def send_interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def read(self) -> None:
        """Waits for more text."""
        assert select.select([self.master], [], [], 240)[0], self.text
        try:
            self._bytes += os.read(self.master, 4096)
        except OSError:
            raise AssertionError(f"it has ended: {self.text!r}") from None
        whole = self._bytes.decode(errors="ignore")  # a read may end within a character
        self.text += whole
        self._bytes = self._bytes[len(whole.encode()) :]

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def wait(self) -> int:
        status = self._process.wait(240)
        os.close(self.master)
        return status


def test_chat(daemon: Daemon) -> None:
    terminal = Terminal(
        "run", "ok", "--max-tokens", "6", "--seed", "1", "--socket", str(daemon.socket)
    )
    terminal.until("/help for help")
    terminal.until(">>> ")
    terminal.type("hello")
    first = terminal.until(">>> ").split()[-1]
    terminal.type("hello")
    second = terminal.until(">>> ").split()[-1]
    assert first != second, "the history is part of the second prompt"
    terminal.type("/clear")
    terminal.until(">>> ")
    terminal.type("hello")
    assert terminal.until(">>> ").split()[-1] == first
    terminal.type("/what is this")
    assert "there is no command /what" in terminal.until(">>> ")
    terminal.type("/help")
    assert "/bye" in terminal.until(">>> ")
    terminal.interrupt()
    assert "to leave" in terminal.until(">>> ")
    terminal.type("/bye")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(daemon: Daemon) -> None:
    terminal = Terminal("run", "stuck", "--seed", "1", "--socket", str(daemon.socket))
    terminal.until(">>> ")
    terminal.type("hello")
    terminal.until("hello\r\n")
    # The spinner's own line is cleared before the answer begins.
    while (last := terminal.text.rpartition("\x1b[K")[2]) == "" or "waiting" in last:
        terminal.read()
    terminal.send_interrupt()
    terminal.until("(stopped)")
    terminal.until(">>> ")
    terminal.type("/bye")
    assert terminal.wait() == 0


def test_a_daemon_that_leaves_in_the_middle(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    call = subprocess.Popen(
        [sys.executable, "-m", "quantd.daemon", "run", "stuck", "hi"]
        + ["--socket", str(daemon.socket)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert call.stdout is not None
    assert call.stdout.read(1), "the answer has begun"
    daemon.stop()
    _, err = call.communicate(timeout=240)
    assert call.returncode == 1
    assert err.startswith("quantd: ") and err.count("\n") == 1
