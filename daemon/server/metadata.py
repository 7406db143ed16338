"""The `metadata` that clients attach to what is kept for them."""

from __future__ import annotations

from collections.abc import Mapping

from quantd.daemon.errors import RequestError
from quantd.daemon.server.limits import MAX_KEY_CHARS, MAX_KEYS, MAX_VALUE_CHARS


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Raises RequestError over one of OpenAI's limits."""
    metadata = metadata or {}
    if len(metadata) > MAX_KEYS:
        raise RequestError(
            f"metadata has {len(metadata)} keys; the limit is {MAX_KEYS}",
            param="metadata",
        )
    for key, value in metadata.items():
        if len(key) > MAX_KEY_CHARS:
            raise RequestError(
                f"metadata: a key has {len(key)} characters; the limit is {MAX_KEY_CHARS}",
                param="metadata",
            )
        if len(value) > MAX_VALUE_CHARS:
            raise RequestError(
                f"metadata[{key}] has {len(value)} characters; the limit is {MAX_VALUE_CHARS}",
                param="metadata",
            )
