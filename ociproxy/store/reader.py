"""Readers: sources of bytes for the store, read in whole pieces, or peeked at first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ociproxy.errors import SizeMismatch

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.digest import Digest


class Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the front of the buffer; returns the number of bytes, 0 or None at the end."""


class BlobFolder(Protocol):
    """A folder with a file for each blob. `open_blob` raises LayoutInvalid."""

    def open_blob(self, digest: Digest) -> FileIO | None: ...


def fill(source: Reader, view: memoryview) -> int:
    """Read until the view is full or the source ends; returns the number of bytes."""
    filled = 0
    while filled < len(view) and (count := source.readinto(view[filled:])):
        filled += count
    return filled


def read(source: Reader, size: int) -> bytes:
    """The next `size` bytes; fewer if the source ends."""
    view = memoryview(bytearray(size))
    return bytes(view[: fill(source, view)])


class PeekableReader:
    """A Reader whose first bytes the caller can look at before it reads them."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The first bytes, fewer if the source ends. Called once, before any read."""
        self._head = read(self._source, size)
        return self._head

    def read(self, size: int, digest: Digest) -> bytes:
        """The next `size` bytes. Raises SizeMismatch, which names the digest, if the source
        ends."""
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
