"""Who may call: API keys, Host and Origin against browsers, peers of the Unix socket.

Two attacks that a daemon on loopback must stop without any key: a web page that posts to it
(its Origin gives it away), and DNS rebinding, where a page's own name is made to resolve to
127.0.0.1 (its Host gives it away). An address literal as Host cannot be rebound, so it passes.
"""

from __future__ import annotations

import grp
import hashlib
import hmac
import ipaddress
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from quantd.daemon.errors import ConfigError, Forbidden, Unauthorized

_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
_WILDCARDS = frozenset({"", "*", "0.0.0.0", "::"})


class ApiKeys:
    """The keys in force. `replace` swaps them all at once (reload); `caller` may run at any time.

    Only digests are kept: all have one length, so a comparison takes the same time for each key,
    and a core dump does not hold what opens the door.
    """

    def __init__(self, named_keys: Iterable[tuple[str, str]] = ()) -> None:
        self._digests = _digests(named_keys)

    @classmethod
    def from_file(cls, path: Path | None) -> ApiKeys:
        """None: no keys, everybody may call."""
        return cls() if path is None else cls(read_keys(path))

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def replace(self, named_keys: Iterable[tuple[str, str]]) -> None:
        self._digests = _digests(named_keys)

    def caller(self, authorization: str | None, x_api_key: str | None) -> str:
        """The name behind the key in `Authorization: Bearer` or `x-api-key`; else Unauthorized."""
        if not self._digests:
            return ""
        presented = _presented(authorization, x_api_key)
        if presented is None:
            raise Unauthorized("no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        digest = _digest(presented)
        found: str | None = None
        for name, known in self._digests:  # no early end: the time must not tell which key it was
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise Unauthorized("the API key is not one of this server's")
        return found


def _digests(named_keys: Iterable[tuple[str, str]]) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, _digest(key)) for name, key in named_keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _presented(authorization: str | None, x_api_key: str | None) -> str | None:
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
    return x_api_key.strip() if x_api_key else None


def read_keys(path: Path) -> list[tuple[str, str]]:
    """(name, key) per line: `KEY` or `NAME:KEY`; empty lines and those that start with # are none.

    A key without a name is called after its line. Raises ConfigError; a file without any key is
    one, because it would open the server to everybody.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {path}: {error}") from None
    keys: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        before, colon, after = text.partition(":")
        name, key = (before.strip(), after.strip()) if colon else (f"line-{number}", text)
        if not name or not key or any(c.isspace() for c in key):
            raise ConfigError(f"api_keys_file {path}, line {number}: expected KEY or NAME:KEY")
        keys.append((name, key))
    if not keys:
        raise ConfigError(f"api_keys_file {path} holds no key")
    return keys


class HostRule:
    """Which Host and Origin headers pass; made once from where the server listens."""

    def __init__(
        self,
        listening_host: str,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
    ) -> None:
        names = {*_LOOPBACK_NAMES, *(host.lower().strip("[]") for host in allowed_hosts)}
        if listening_host.lower() in _WILDCARDS or not _is_loopback(listening_host):
            # Others are meant to reach this machine, so its own name is not a stranger's.
            names.add(socket.gethostname().lower())
        names.add(listening_host.lower().strip("[]"))
        names -= _WILDCARDS - {"*"}
        self._any_host = "*" in allowed_hosts
        self._hosts = frozenset(names)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    def check_host(self, header: str | None) -> None:
        """Raises Forbidden. None is HTTP/1.0, which no browser speaks."""
        if header is None or self._any_host:
            return
        host = _host_of(header)
        if host in self._hosts or _is_address(host) or host.endswith(".localhost"):
            return
        raise Forbidden(
            f"Host {header!r} is not this server's name; add it to server.allowed_hosts",
            code="host_not_allowed",
        )

    def check_origin(self, origin: str | None, host_header: str | None) -> None:
        """Raises Forbidden unless the page comes from this machine or is allowed by name."""
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return
        scheme, separator, authority = origin.lower().partition("://")
        if separator and scheme in ("http", "https"):
            if host_header is not None and authority == host_header.lower():
                return
            host = _host_of(authority)
            if host.endswith(".localhost") or host in _LOOPBACK_NAMES or _is_loopback(host):
                return
        raise Forbidden(
            f"Origin {origin!r} may not call this server; add it to server.allowed_origins",
            code="origin_not_allowed",
        )


def _host_of(authority: str) -> str:
    """Lower case, without port and brackets."""
    text = authority.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host.lower() in _LOOPBACK_NAMES:
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


class Peer(NamedTuple):
    """Who is at the other end of a Unix connection, as the kernel says it."""

    pid: int
    uid: int
    gid: int


class _HasSockopt(Protocol):
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


_UCRED = struct.Struct("3i")


def peer_of(connection: _HasSockopt) -> Peer:
    """SO_PEERCRED: the credentials at the time of connect()."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(raw))


def may_administer(peer: Peer, socket_gid: int | None) -> bool:
    """The daemon's own user, root, and members of the socket file's group (None: no file)."""
    if peer.uid in (0, os.geteuid()):
        return True
    return socket_gid is not None and (peer.gid == socket_gid or _is_member(peer.uid, socket_gid))


def _is_member(uid: int, gid: int) -> bool:
    try:
        name = pwd.getpwuid(uid).pw_name
        return name in grp.getgrgid(gid).gr_mem or gid == pwd.getpwuid(uid).pw_gid
    except KeyError:
        return False
