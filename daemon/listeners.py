"""The sockets that the daemon listens on, and the HTTP faces on them."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

from quantd.daemon.config import ServerSettings
from quantd.daemon.config.environment import process_variables
from quantd.daemon.errors import ConfigError
from quantd.daemon.server import sockets

if TYPE_CHECKING:
    from aiohttp import web


class Listener:
    """A listening socket. `inherited`: the service manager bound it and keeps it open."""

    def __init__(self, sock: socket.socket, inherited: bool) -> None:
        self.sock = sock
        self.inherited = inherited
        self.is_unix = sock.family == socket.AF_UNIX
        self.address = _address(sock)
        """http://127.0.0.1:8420, a path, or @name."""

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        return self.is_unix or ip_address(self.sock.getsockname()[0].partition("%")[0]).is_loopback

    def close(self) -> None:
        """Idempotent. Removes the file of a Unix socket that we made."""
        if self.is_unix and not self.inherited:
            sockets.remove_unix(self.address, self.sock)
        self.sock.close()


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return name if isinstance(name, str) else "@" + os.fsdecode(name[1:])
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def open_listeners(server: ServerSettings) -> list[Listener]:
    """Those of the service manager if it passed any, else the configured ones.

    Raises ConfigError, and leaves none open then.
    """
    passed = sockets.inherited(process_variables())
    if passed:
        return [Listener(sock, True) for _, sock in passed]
    bound = [Listener(sock, False) for sock in sockets.bind_tcp(server.host, server.port)]
    try:
        if server.socket is not None:
            bound.append(Listener(sockets.bind_unix(server.socket, server.socket_mode), False))
    except ConfigError:
        for listener in bound:
            listener.close()
        raise
    return bound


class Faces:
    """The HTTP faces at work on their listeners. Event loop only."""

    def __init__(self) -> None:
        self._runners: list[web.AppRunner] = []
        self._inherited: list[asyncio.AbstractServer] = []
        self._own: list[asyncio.AbstractServer] = []

    async def add(self, runner: web.AppRunner, listeners: list[Listener]) -> None:
        """Serves a runner's application on these listeners."""
        from quantd.daemon.server.connection import connections

        await runner.setup()
        self._runners.append(runner)
        loop = asyncio.get_running_loop()
        make_connection = connections(runner)
        for listener in listeners:
            # aiohttp's SockSite takes no Unix socket under uvloop.
            create = loop.create_unix_server if listener.is_unix else loop.create_server
            # It listens again, by itself with 100: the next client of a Unix socket is refused.
            server = await create(make_connection, sock=listener.sock, backlog=sockets.BACKLOG)
            (self._inherited if listener.inherited else self._own).append(server)

    def release_inherited(self) -> None:
        """Connections to the service manager's sockets now wait for the next instance. Our own
        stay open, to answer that the daemon is stopping."""
        for server in self._inherited:
            server.close()

    async def close(self) -> None:
        """Ends all connections when their handlers have ended, or the runners' patience has."""
        for server in self._own:
            server.close()
        await asyncio.gather(*(runner.cleanup() for runner in self._runners))
