"""The units in a booted systemd: start on the first connection, restart without a lost request.

Needs root, systemd-nspawn and a Debian tree, made once by

    debootstrap --variant=minbase --include=systemd,dbus bookworm ROOT

whose path is in $QUANTD_TEST_ROOT; skipped otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = os.environ.get("QUANTD_TEST_ROOT")

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.skipif(os.geteuid() != 0, reason="systemd-nspawn needs root"),
    pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="systemd-nspawn is missing"),
    pytest.mark.skipif(not ROOT, reason="$QUANTD_TEST_ROOT names no Debian tree"),
]

# Run inside the container. Each request is a connection of its own, as a proxy would make them.
CLIENT = r"""
import concurrent.futures, http.client, json, socket, subprocess, sys, threading, time

class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect("/run/quantd.sock")

def ask(unix, tokens):
    kind = Unix if unix else http.client.HTTPConnection
    connection = kind("127.0.0.1", 8420, timeout=240)
    body = {"model": "demo", "prompt": "1 + 2", "max_tokens": tokens, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer.get("usage", {}).get("completion_tokens"), answer.get("error")

if sys.argv[1] == "once":
    print(json.dumps([ask(True, 4), ask(False, 4)]))
else:
    seen, over = [], threading.Event()
    def keep_asking(i):
        while not over.is_set():
            seen.append(ask(i % 2 == 0, 40 + i))
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        loads = [threads.submit(keep_asking, i) for i in range(6)]
        try:
            while len(seen) < 12 and not any(load.done() for load in loads):
                time.sleep(0.01)
            subprocess.run(["systemctl", "restart", "quantd.service"], check=True)
            before = len(seen)
            while len(seen) < before + 12 and not any(load.done() for load in loads):
                time.sleep(0.01)
        finally:
            over.set()
        for load in loads:
            load.result()
    print(json.dumps(seen))
"""


class Container:
    """A booted system that sees this checkout and this interpreter."""

    def __init__(self, root: Path) -> None:
        base = Path(sys.base_prefix)
        _install_units(root)
        command = ["systemd-nspawn", "-q", "-D", str(root), "--boot", "--private-network"]
        command += ["--register=no", "--keep-unit", "--console=pipe"]
        command += [f"--bind-ro={base}:/opt/python", f"--bind-ro={REPOSITORY}"]
        packages = Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages")
        command += [f"--bind-ro={packages}:/opt/venv/lib/{packages.parent.name}/site-packages"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait_until_booted()

    def run(self, *command: str, check: bool = True) -> str:
        """A command inside; its output."""
        entered = ["nsenter", "-t", str(self._init()), "-a", *command]
        done = subprocess.run(entered, capture_output=True, text=True, timeout=540)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _init(self) -> int:
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _wait_until_booted(self) -> None:
        deadline = time.monotonic() + 240
        while True:
            try:
                state = self.run("systemctl", "is-system-running", check=False)
                if state in ("running", "degraded"):
                    return
            except (OSError, IndexError):
                state = "no init"
            assert time.monotonic() < deadline, f"the container did not boot: {state}"
            time.sleep(0.2)


def _install_units(root: Path) -> None:
    """The units as they are in the repository, but for the command's path."""
    units = root / "etc/systemd/system"
    for name in ("quantd.service", "quantd.socket"):
        text = (REPOSITORY / "systemd" / name).read_text()
        start = "ExecStart=/opt/venv/bin/python -m quantd.daemon serve demo"
        text = text.replace("ExecStart=/usr/bin/quantd serve", start)
        (units / name).write_text(text)
    for kind in ("sysusers.d", "tmpfiles.d"):
        for file in (REPOSITORY / "systemd" / kind).glob("*.conf"):
            (root / "usr/lib" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / "usr/lib" / kind / file.name)
    version = f"python3.{sys.version_info.minor}"
    (root / "opt/venv/bin").mkdir(parents=True, exist_ok=True)
    (root / f"opt/venv/lib/{version}/site-packages").mkdir(parents=True, exist_ok=True)
    (root / "opt/venv/pyvenv.cfg").write_text("home = /opt/python/bin\n")
    python = root / "opt/venv/bin/python"
    python.unlink(missing_ok=True)
    python.symlink_to(f"/opt/python/bin/{version}")
    (root / "opt/client.py").write_text(CLIENT)
    (root / "etc/ld.so.conf.d/python.conf").write_text("/opt/python/lib\n")


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    assert ROOT is not None
    container = Container(Path(ROOT))
    container.run("ldconfig")
    container.run("systemctl", "start", "quantd.socket")
    yield container
    container.run("journalctl", "--no-pager", "-u", "quantd.service", check=False)
    container.close()


def test_the_first_connection_starts_the_service(container: Container) -> None:
    before = container.run("systemctl", "is-active", "quantd.service", check=False)
    assert before == "inactive"
    answers = json.loads(container.run("/opt/venv/bin/python", "/opt/client.py", "once"))
    assert answers == [[200, 4, None], [200, 4, None]]
    assert container.run("systemctl", "is-active", "quantd.service") == "active"
    assert container.run("systemctl", "show", "-P", "User", "quantd.service") == "quantd"


def test_a_restart_under_load_loses_no_request(container: Container) -> None:
    first = container.run("systemctl", "show", "-P", "MainPID", "quantd.service")
    answers = json.loads(container.run("/opt/venv/bin/python", "/opt/client.py", "load"))
    assert len(answers) >= 24
    assert [answer for answer in answers if answer[0] != 200] == []
    assert container.run("systemctl", "show", "-P", "MainPID", "quantd.service") != first


def test_reload_keeps_the_process(container: Container) -> None:
    before = container.run("systemctl", "show", "-P", "MainPID", "quantd.service")
    container.run("systemctl", "reload", "quantd.service")
    assert container.run("systemctl", "show", "-P", "MainPID", "quantd.service") == before
    assert container.run("systemctl", "is-active", "quantd.service") == "active"
