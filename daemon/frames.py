"""The wire between an engine and its worker: length-prefixed msgpack frames of `types.py`.

    frame := length (4 bytes, unsigned, big-endian) payload (that many bytes of msgpack)

Here is the codec alone, without a socket, because both ends need it and they read differently: a
worker blocks on its socket, the engine is called back by the event loop. Anything that is not a
frame of the expected type raises `FrameError`; after that the connection is of no use, since there
is no way to find the start of the next frame.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import Any, Generic, TypeVar

import msgspec

from quantd.daemon.types import FromWorker, ToWorker

HEADER_BYTES = 4

MAX_FRAME_BYTES = 1 << 28
"""Most bytes of one payload. The longest honest frame adds a full batch of long prompts (64 of
131,072 tokens are 40 MiB); the bound keeps a garbled length from asking for 4 GiB."""

Message = TypeVar("Message")


class FrameError(Exception):
    """The bytes are not a frame of the expected type."""


class FrameEncoder:
    """Makes frames. Not for several threads at once: the buffer is reused."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray(HEADER_BYTES)

    def encode(self, message: ToWorker | FromWorker) -> bytes:
        """Header and payload of `message`. Raises `FrameError` when it is over the bound."""
        buffer = self._buffer
        self._encoder.encode_into(message, buffer, HEADER_BYTES)
        length = len(buffer) - HEADER_BYTES
        if length > MAX_FRAME_BYTES:
            kind = type(message).__name__
            raise FrameError(f"a {kind} frame of {length} bytes is over {MAX_FRAME_BYTES}")
        buffer[:HEADER_BYTES] = length.to_bytes(HEADER_BYTES, "big")
        return bytes(buffer)


class FrameDecoder(Generic[Message]):
    """Cuts a stream of bytes, in whatever pieces it arrives, into messages of one union."""

    def __init__(self, union: Any) -> None:
        """`union` is `Message` as a value; Any, since a union is no `type[Message]`."""
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(union)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, in order. Raises `FrameError`."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            length = _length(buffer[start : start + HEADER_BYTES])
            stop = start + HEADER_BYTES + length
            if len(buffer) < stop:
                break
            messages.append(self.decode(buffer[start + HEADER_BYTES : stop]))
            start = stop
        del buffer[:start]
        return messages

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of a frame that has not fully arrived."""
        return len(self._buffer)

    def decode(self, payload: bytes | bytearray) -> Message:
        """One payload, without its header. Raises `FrameError`."""
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise FrameError(f"not a frame: {error}") from None


class FrameSocket(Generic[Message]):
    """A blocking socket that speaks frames: the worker's end. `Message` is what it receives.

    Any thread may send; one receives.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._socket = sock
        self._encoder = FrameEncoder()
        self._sending = threading.Lock()
        self._decoder: FrameDecoder[Message] = FrameDecoder(receives)
        # Not select.select, which takes no file descriptor beyond 1,023.
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)

    def is_readable(self) -> bool:
        """`receive` has something to read, or the end to tell. Does not wait; for the thread that
        receives."""
        return bool(self._arrivals.poll(0))

    def send(self, message: ToWorker | FromWorker) -> None:
        """Returns when the kernel has all of it. Raises OSError when the other end is gone."""
        with self._sending:
            self._socket.sendall(self._encoder.encode(message))

    def receive(self) -> Message | None:
        """Blocks for the next message; None when the other end is closed, also within a frame."""
        header = self._read(HEADER_BYTES)
        if header is None:
            return None
        payload = self._read(_length(header))
        return None if payload is None else self._decoder.decode(payload)

    def _read(self, size: int) -> bytes | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        filled = 0
        while filled < size:
            try:
                received = self._socket.recv_into(view[filled:])
            except ConnectionResetError:
                return None
            if received == 0:
                return None
            filled += received
        return bytes(buffer)


def _length(header: bytes | bytearray) -> int:
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is over the bound of {MAX_FRAME_BYTES}")
    return length
