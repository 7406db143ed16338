"""What clients leave with the daemon: files, batches, responses, conversations, events to send.

Everything here outlives the process, SIGKILL included. Every object has an owner, the name of an
API key; whoever asks with another name finds nothing.
"""

from quantd.daemon.store.batches import Batch, Batches, Line, Result
from quantd.daemon.store.conversations import Conversation, Conversations
from quantd.daemon.store.database import Database
from quantd.daemon.store.files import File, Files, Upload
from quantd.daemon.store.items import Item
from quantd.daemon.store.outbox import Event, Outbox
from quantd.daemon.store.responses import Response, Responses
from quantd.daemon.store.store import Store

__all__ = [
    "Batch",
    "Batches",
    "Conversation",
    "Conversations",
    "Database",
    "Event",
    "File",
    "Files",
    "Item",
    "Line",
    "Outbox",
    "Response",
    "Responses",
    "Result",
    "Store",
    "Upload",
]
