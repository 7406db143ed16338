"""Listening sockets: TCP, Unix, and those that systemd has bound for us.

All are returned bound and listening or ready to listen; whoever gets one owns it.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from quantd.daemon.errors import ConfigError

BACKLOG = 4096
"""Clients that connect while the event loop is at something else; the kernel has its own bound."""
_FIRST_INHERITED_FD = 3
_PATH_LIMIT = 107
"""sockaddr_un.sun_path is 108 bytes, the last one a zero."""


def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """One socket per address of `host`; "" and "*" mean all addresses. Port 0: the system picks.

    Raises ConfigError that names host and port.
    """
    name = None if host in ("", "*") else host.strip("[]")
    try:
        found = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"server.host {host!r}: {error}") from None
    bound: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            chosen = bound[0].getsockname()[1] if bound and port == 0 else port
            bound.append(_bind_address(family, (address[0], chosen, *address[2:])))
    except OSError as error:
        for open_socket in bound:
            open_socket.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return bound


def _bind_address(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Else [::] takes the IPv4 port too, and the second bind of "*" fails.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def bind_unix(path: str | Path, mode: int = 0o660) -> socket.socket:
    """A Unix socket at `path` with these permissions; "@name" is Linux's abstract namespace.

    A socket file whose daemon is dead is replaced. Raises ConfigError: a living daemon is there,
    something that is no socket is there, or the path is too long.
    """
    text = os.fspath(path)
    if text.startswith("@"):
        return _bind_abstract(text)
    size = len(os.fsencode(text))
    if size > _PATH_LIMIT:
        raise ConfigError(
            f"server.socket {text!r} is {size} bytes long; the limit is {_PATH_LIMIT} bytes"
        )
    _remove_dead_socket(text)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The file is born with no permission at all, so nobody gets in before chmod has run. The umask
    # is the process's, but no other thread creates files while the daemon starts.
    umask = os.umask(0o777)
    try:
        sock.setblocking(False)
        sock.bind(text)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {text}: {error.strerror}") from None
    finally:
        os.umask(umask)
    os.chmod(text, mode)
    sock.listen(BACKLOG)
    return sock


def _bind_abstract(name: str) -> socket.socket:
    address = b"\0" + os.fsencode(name[1:])
    if not 1 < len(address) <= _PATH_LIMIT + 1:
        raise ConfigError(
            f"server.socket {name!r}: an abstract name has 1 to {_PATH_LIMIT} bytes after the @"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {name}: {error.strerror}") from None
    return sock


def _remove_dead_socket(path: str) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"server.socket {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"server.socket {path} is there and is not a socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog answers EAGAIN instead of making us wait
        reply = probe.connect_ex(path)
    if reply != errno.ECONNREFUSED:
        why = "another daemon listens there" if reply in (0, errno.EAGAIN) else os.strerror(reply)
        raise ConfigError(f"cannot listen on {path}: {why}")
    os.unlink(path)


def remove_unix(path: str | Path, sock: socket.socket) -> None:
    """Delete the file of a socket made by `bind_unix`, unless another daemon has replaced it."""
    text = os.fspath(path)
    if text.startswith("@"):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        sock.close()
        probe.setblocking(False)
        if probe.connect_ex(text) == errno.ECONNREFUSED:
            os.unlink(text)


def inherited(environ: MutableMapping[str, str]) -> list[tuple[str, socket.socket]]:
    """(name, socket) for each descriptor that systemd passed, per sd_listen_fds(3).

    Removes the variables from `environ`, so that a child does not take them for its own. Raises
    ConfigError for a descriptor that is no listening stream socket.
    """
    pid, count, names = (
        environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    labels = names.split(":") if names else []
    found: list[tuple[str, socket.socket]] = []
    for index in range(int(count)):
        fd = _FIRST_INHERITED_FD + index
        name = labels[index] if index < len(labels) else "unknown"
        found.append((name, _adopt(fd, name)))
    return found


def _adopt(fd: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(
            f"inherited descriptor {fd} ({name}) is no socket: {error.strerror}"
        ) from None
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listening:
        raise ConfigError(f"inherited descriptor {fd} ({name}) is not a listening stream socket")
    sock.setblocking(False)
    return sock
