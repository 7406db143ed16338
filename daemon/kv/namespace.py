"""What must be equal, beside the tokens, for two sequences to share KV blocks."""

from __future__ import annotations

import hashlib

import msgspec


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """A root of the prefix tree. Two of them are equal only if every field is, so a salt "x" is
    never taken for an adapter "x". Whoever adds something that changes keys or values adds a field.
    """

    revision: str
    """Of the weights, formats, dtype, rope settings and kernels (`ModelInfo.kv_revision`)."""
    precision_epoch: int = 0
    """Counts the changes of layers' precision while the model runs."""
    adapter: bytes = b""
    """Digest of the adapter's content, not its name; empty: none."""
    media: tuple[tuple[int, bytes], ...] = ()
    """(position, digest of the preprocessed content) of every image and sound in the prompt."""
    rope: str = ""
    """Position settings that a request has chosen for itself."""
    salt: str = ""
    """The caller's: who does not know it cannot find out by timing what others have sent."""
    alone: int = 0
    """Not 0: of one sequence only, whose blocks nobody else may use."""

    def digest(self) -> bytes:
        """32 bytes that stand for the namespace outside of this process."""
        named = [(name, getattr(self, name)) for name in self.__struct_fields__]
        encoded = msgspec.msgpack.encode(named)
        return hashlib.blake2b(encoded, digest_size=32, person=b"quantd-kv-root").digest()
