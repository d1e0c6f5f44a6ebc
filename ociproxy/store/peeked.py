"""A source of bytes that can be looked at before it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ociproxy.errors import SizeMismatch

if TYPE_CHECKING:
    from ociproxy.digest import Digest
    from ociproxy.store.blob_writer import Source


class Peeked:
    """Itself a Source: what was peeked at is read again."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The first bytes, once, before anything is read; fewer where it ends."""
        self._head = _read(self._source, size)
        return self._head

    def read(self, size: int, digest: Digest) -> bytes:
        """So many bytes. Raises SizeMismatch, for a blob of this digest, where it ends early."""
        raw = _read(self, size)
        if len(raw) < size:
            raise SizeMismatch(f"blob {digest}", size, len(raw))
        return raw

    def readinto(self, buffer: memoryview, /) -> int | None:
        if not self._head:
            return self._source.readinto(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count


def _read(source: Source, size: int) -> bytes:
    raw = bytearray(size)
    view, filled = memoryview(raw), 0
    while filled < size and (count := source.readinto(view[filled:])):
        filled += count
    return bytes(view[:filled])
