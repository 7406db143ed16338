"""One at a time, in order of arrival: in a conversation, so that a response sees all that was said
before it; before a full queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Event loop only. Who waits gets on in order of arrival; nothing is kept of a name that
    nobody is at."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, name: str | None) -> AsyncIterator[None]:
        """None: who has none waits for nobody."""
        if name is None:
            yield
            return
        lock, count = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, count + 1)
        try:
            async with lock:
                yield
        finally:
            _, count = self._locks[name]
            if count == 1:
                del self._locks[name]
            else:
                self._locks[name] = (lock, count - 1)
