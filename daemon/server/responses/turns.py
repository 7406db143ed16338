"""One at a time in each conversation: a response sees all that was said before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Event loop only. Who waits gets on in order of arrival; nothing is kept of a conversation
    in which nobody is."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, conversation: str | None) -> AsyncIterator[None]:
        """None: a response without one waits for nobody."""
        if conversation is None:
            yield
            return
        lock, count = self._locks.get(conversation, (asyncio.Lock(), 0))
        self._locks[conversation] = (lock, count + 1)
        try:
            async with lock:
                yield
        finally:
            _, count = self._locks[conversation]
            if count == 1:
                del self._locks[conversation]
            else:
                self._locks[conversation] = (lock, count - 1)
