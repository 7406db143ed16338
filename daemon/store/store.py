"""The rooms' one door: everything that is kept, over one database."""

from __future__ import annotations

from quantd.daemon.config import StoreSettings
from quantd.daemon.store import files
from quantd.daemon.store.batches import Batches
from quantd.daemon.store.bounds import Bounds, OnGone
from quantd.daemon.store.conversations import Conversations
from quantd.daemon.store.database import Connection, Database
from quantd.daemon.store.files import Files
from quantd.daemon.store.outbox import Outbox
from quantd.daemon.store.responses import Responses


class Store:
    """Opens nothing before the first call of one of its parts."""

    def __init__(self, settings: StoreSettings, on_gone: OnGone = lambda id: None) -> None:
        self.database = Database(settings.path, self._on_open, (files.FOLDER,))
        self.files = Files(self.database, settings.file_bytes, settings.files_bytes)
        self.batches = Batches(self.database)
        bounds = Bounds(settings.responses_bytes, settings.responses_seconds)
        self.responses = Responses(self.database, bounds, on_gone)
        self.conversations = Conversations(self.database, bounds, on_gone)
        self.outbox = Outbox(self.database)

    def _on_open(self, db: Connection) -> None:
        files.tidy(db, self.files.folder)

    def exists(self) -> bool:
        """Whether a former run may have left something; opens nothing."""
        return self.database.exists()

    async def close(self) -> None:
        await self.database.close()
