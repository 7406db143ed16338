"""How the commands talk to a daemon: HTTP over its Unix socket, else over TCP."""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import shutil
import socket
import uuid
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quantd.daemon.cli.parser import settings_flags
from quantd.daemon.config import Environment, load
from quantd.daemon.config.environment import SYSTEM_SOCKET
from quantd.daemon.errors import QuantdError

_PIECE = 1 << 20


class ClientError(QuantdError):
    """The daemon is not there, or has refused; `status` of the answer in `http_status`."""

    def __init__(self, message: str, http_status: int | None = None, code: str | None = None):
        super().__init__(message, code=code)
        self.http_status = http_status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(_address(self._path))


@dataclass(frozen=True, slots=True)
class Target:
    """A daemon's address. `path` is its Unix socket, else TCP is used."""

    path: Path | None = None
    host: str = ""
    port: int = 0
    api_key: str | None = None
    timeout: float | None = None
    """Seconds that the daemon may be silent; None: any. A model may take minutes to load."""

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"http://{self.host}:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        if self.path is not None:
            return _UnixConnection(self.path, self.timeout)
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)

    def answers(self) -> bool:
        """Whether something listens there."""
        connection = self.connect()
        try:
            connection.connect()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, body)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer. Closing the iterator ends the request."""
        connection, response = self._send("POST", path, body)
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ClientError(event["error"]["message"], code=event["error"].get("code"))
                yield event
            raise ClientError("the daemon ended the answer early")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ClientError(f"the connection to the daemon broke: {error}") from None
        finally:
            response.close()
            connection.close()

    def upload(self, path: str, file: Path, fields: Mapping[str, str]) -> Any:
        """Posts a file as a form, in pieces. Raises OSError when it cannot be read."""
        mark = uuid.uuid4().hex
        part = f'--{mark}\r\nContent-Disposition: form-data; name="'
        head = "".join(f'{part}{name}"\r\n\r\n{text}\r\n' for name, text in fields.items())
        name = quote(file.name, safe=" ()[]+,;=@")
        head += f'{part}file"; filename="{name}"\r\n\r\n'
        start, end = head.encode(), f"\r\n--{mark}--\r\n".encode()
        with file.open("rb") as data:
            headers = {
                "Content-Type": f"multipart/form-data; boundary={mark}",
                "Content-Length": str(len(start) + os.fstat(data.fileno()).st_size + len(end)),
            }
            pieces = itertools.chain([start], iter(lambda: data.read(_PIECE), b""), [end])
            connection, response = self._request("POST", path, pieces, headers)
            try:
                return json.loads(response.read())
            finally:
                connection.close()

    def download(self, path: str, file: Path) -> None:
        """Writes an answer's bytes, in pieces. Raises OSError when it cannot be written."""
        connection, response = self._send("GET", path, None)
        try:
            with file.open("wb") as data:
                shutil.copyfileobj(response, data, _PIECE)
        except http.client.HTTPException as error:
            raise ClientError(f"the connection to the daemon broke: {error}") from None
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        connection, response = self._send(method, path, body)
        try:
            return json.loads(response.read() or b"null")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ClientError(f"{self}{path}: not an answer of quantd: {error}") from None
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        if body is None:
            return self._request(method, path, None, {})
        headers = {"Content-Type": "application/json"}
        return self._request(method, path, json.dumps(body).encode(), headers)

    def _request(
        self,
        method: str,
        path: str,
        data: bytes | Iterable[bytes] | None,
        headers: dict[str, str],
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        connection = self.connect()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
        except OSError as error:
            connection.close()
            raise ClientError(
                f"cannot reach a daemon at {self}: {error.strerror or error}"
            ) from None
        except http.client.HTTPException as error:
            connection.close()
            raise ClientError(f"{self} does not speak HTTP: {error!r}") from None
        if response.status != 200:
            text = response.read()
            connection.close()
            raise _refusal(response.status, text)
        return connection, response


def find(arguments: argparse.Namespace) -> Target:
    """The daemon that the flags or the configuration mean. Raises ClientError: none is running."""
    target = find_if_any(arguments)
    if target is None:
        places = " or ".join(str(place) for place in _places(arguments))
        raise ClientError(f"no daemon is running at {places}; start one with `quantd serve`")
    return target


def find_if_any(arguments: argparse.Namespace) -> Target | None:
    """The first of the places where a daemon listens."""
    return next((place for place in _places(arguments) if place.answers()), None)


def _places(arguments: argparse.Namespace) -> list[Target]:
    """The user's own daemon, the machine's, then TCP; with a flag only what it names."""
    environment = Environment.read()
    flags = settings_flags(arguments)
    config = Path(arguments.config) if arguments.config else None
    settings = load(config, flags, environment)
    server = settings.server
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}.get(server.host, server.host)
    tcp = Target(None, host.strip("[]"), server.port, environment.api_key)
    sockets = [server.socket]
    if settings.origin["server.socket"] == "default" and server.socket != SYSTEM_SOCKET:
        sockets.append(SYSTEM_SOCKET)
    unix = [Target(path) for path in sockets if path is not None]
    if "server.socket" in flags:
        return unix
    if "server.port" in flags or "server.host" in flags:
        return [tcp]
    return [*unix, tcp]


def _address(path: Path) -> str:
    text = str(path)
    return "\0" + text[1:] if text.startswith("@") else text


def _refusal(status: int, body: bytes) -> ClientError:
    try:
        error = json.loads(body)["error"]
        return ClientError(error["message"], status, error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ClientError(f"the daemon answered with status {status}", status)
