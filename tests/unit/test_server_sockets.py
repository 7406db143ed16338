"""Sockets of our own, dead ones, living ones, and those that systemd hands over."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvloop
from aiohttp import web

from quantd.daemon.config import ServerSettings
from quantd.daemon.errors import ConfigError
from quantd.daemon.listeners import Faces, open_listeners
from quantd.daemon.server.app import create_runner
from quantd.daemon.server.sockets import bind_tcp, bind_unix, inherited, remove_unix


def test_tcp_on_a_free_port() -> None:
    (sock,) = bind_tcp("127.0.0.1", 0)
    with sock:
        port = sock.getsockname()[1]
        assert port > 0
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            bind_tcp("127.0.0.1", port)


def test_tcp_on_all_addresses_has_one_port() -> None:
    sockets = bind_tcp("", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


def test_a_host_that_is_none() -> None:
    with pytest.raises(ConfigError, match="no.such.invalid"):
        bind_tcp("no.such.invalid", 0)


def test_unix_mode_and_removal(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sock = bind_unix(path, 0o640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    remove_unix(path, sock)
    assert not path.exists()


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix(path).close()
    assert path.exists()
    with bind_unix(path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_living_daemons_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with bind_unix(path):
        with pytest.raises(ConfigError, match="another daemon"):
            bind_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_removal_spares_the_successors_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = bind_unix(path)
    path.unlink()
    with bind_unix(path):
        remove_unix(path, first)
        assert path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_path_lengths(tmp_path: Path) -> None:
    room = 107 - len(os.fsencode(tmp_path)) - 1
    bind_unix(tmp_path / ("x" * room)).close()
    with pytest.raises(ConfigError, match="108 bytes long; the limit is 107"):
        bind_unix(tmp_path / ("x" * (room + 1)))
    with pytest.raises(ConfigError, match="No such file"):
        bind_unix(tmp_path / "no" / "folder")


def test_abstract() -> None:
    name = f"@quantd-{uuid.uuid4().hex}"
    sock = bind_unix(name)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + name[1:])
    with pytest.raises(ConfigError, match="Address already in use"):
        bind_unix(name)
    remove_unix(name, sock)
    sock.close()
    for bad in ("@", "@" + "x" * 108):
        with pytest.raises(ConfigError, match="abstract"):
            bind_unix(bad)


def test_nothing_inherited() -> None:
    for environ in (
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"},
    ):
        before = dict(environ)
        assert inherited(environ) == []
        assert environ == {} or environ == {
            k: v for k, v in before.items() if not k.startswith("LISTEN")
        }


_CHILD = """
import os, sys
from quantd.daemon.errors import ConfigError
from quantd.daemon.server.sockets import inherited
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[1],
           "LISTEN_FDNAMES": sys.argv[2], "PATH": "/bin"}
try:
    found = inherited(environ)
except ConfigError as error:
    print("error:", error)
else:
    print([(name, sock.family.name, sock.get_inheritable()) for name, sock in found], environ)
"""


def _run_child(fds: list[int], names: str) -> str:
    """Runs `inherited` in a process whose descriptors 3, 4 … are these."""
    copies = [os.dup2(fd, 3 + 100 + i, inheritable=True) for i, fd in enumerate(fds)]
    shell = " ".join(f"{3 + i}<&{copy}" for i, copy in enumerate(copies))
    command = ["bash", "-c", f'exec "$@" {shell}', "-", sys.executable, "-c", _CHILD]
    done = subprocess.run(
        [*command, str(len(fds)), names], pass_fds=copies, capture_output=True, text=True
    )
    for copy in copies:
        os.close(copy)
    assert not done.stderr
    return done.stdout.strip()


def test_sockets_from_systemd(tmp_path: Path) -> None:
    (tcp,) = bind_tcp("127.0.0.1", 0)
    with tcp, bind_unix(tmp_path / "s") as unix:
        assert _run_child([unix.fileno(), tcp.fileno()], "unix:http") == (
            "[('unix', 'AF_UNIX', False), ('http', 'AF_INET', False)] {'PATH': '/bin'}"
        )


def test_a_descriptor_that_is_no_listening_socket(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("")
    with file.open() as opened:
        assert "descriptor 3 (x) is no socket" in _run_child([opened.fileno()], "x")
    with socket.socket() as fresh:
        assert "not a listening" in _run_child([fresh.fileno()], "x")


def test_a_thousand_may_connect_while_the_loop_is_busy(tmp_path: Path) -> None:
    """uvloop listens once more, and by itself for a hundred."""

    async def connect() -> int:
        settings = ServerSettings(port=0, socket=tmp_path / "s")
        listeners, faces = open_listeners(settings), Faces()
        try:
            await faces.add(create_runner(web.Application()), listeners)
            with ExitStack() as stack:
                for number in range(1000):  # nothing is awaited, so nobody is accepted
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    try:
                        client.connect(str(tmp_path / "s"))
                    except BlockingIOError:
                        return number
                return 1000
        finally:
            await faces.close()
            for listener in listeners:
                listener.close()

    assert uvloop.run(connect()) == min(1000, int(Path("/proc/sys/net/core/somaxconn").read_text()))
