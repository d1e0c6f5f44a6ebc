"""Where bytes that go into the store come from: read in whole pieces, or looked at first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ociproxy.errors import SizeMismatch

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest


class Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None:
        """How many bytes there were; 0 at the end."""


def fill(source: Reader, view: memoryview) -> int:
    """Read as many bytes as there are, up to the whole of the view."""
    filled = 0
    while filled < len(view) and (count := source.readinto(view[filled:])):
        filled += count
    return filled


def read(source: Reader, size: int) -> bytes:
    """So many bytes; fewer where the reader ends."""
    view = memoryview(bytearray(size))
    return bytes(view[: fill(source, view)])


class PeekableReader:
    """A Reader whose first bytes can be looked at before they are read."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The first bytes, once, before anything is read; fewer where it ends."""
        self._head = read(self._source, size)
        return self._head

    def read(self, size: int, digest: Digest) -> bytes:
        """So many bytes. Raises SizeMismatch, for a blob of this digest, where it ends early."""
        raw = read(self, size)
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
