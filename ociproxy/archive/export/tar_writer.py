"""Writing a tar: GNU format, one regular file after the other, nothing in it but names and bytes.

GNU rather than PAX: some readers never see a PAX record and take a blob over 8 GiB for an empty
one. Times, owners and modes are the same for everybody.
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestMismatch, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.store.files import read_buffer
from ociproxy.store.hashing import BEHIND

if TYPE_CHECKING:
    from io import RawIOBase

    from ociproxy.archive.export.output import Sink

BLOCK: Final = tarfile.BLOCKSIZE
_END_BLOCKS: Final = 2
_MODE: Final = 0o644

_BUFFERS: Final = BEHIND + 1
_BUFFER_SIZE: Final = 256 * 1024
"""Bytes; with the count of buffers, what copying takes of memory however large the blobs are."""


def member_size(name: str, size: int) -> int:
    """Bytes that a member takes in the tar."""
    return len(_header(name, size)) + size + _padding(size)


END_SIZE: Final = _END_BLOCKS * BLOCK


class TarWriter:
    """Writes members to a sink; reading, hashing and writing overlap."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._buffers = [read_buffer(_BUFFER_SIZE) for _ in range(_BUFFERS)]
        self._next = 0

    def add(self, name: str, data: bytes) -> None:
        self._sink.write(_header(name, len(data)))
        self._sink.write(data + b"\0" * _padding(len(data)))

    def add_file(self, name: str, source: RawIOBase, digest: Digest, size: int) -> None:
        """Copy what must be these bytes. Raises SizeMismatch or DigestMismatch where they are not,
        which leaves the tar unusable."""
        self._sink.write(_header(name, size))
        hasher = digest.hasher()
        left = size
        while left:
            buffer = self._buffers[self._next]
            self._next = (self._next + 1) % _BUFFERS
            count = source.readinto(buffer[: min(left, _BUFFER_SIZE)])
            if not count:
                raise SizeMismatch(f"stored blob {digest}", size, size - left)
            self._sink.write(buffer[:count], hasher)
            left -= count
        self._sink.settle()
        actual = Digest.finish(hasher, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(f"stored blob {digest}", digest, actual)
        self._sink.write(b"\0" * _padding(size))

    def finish(self) -> None:
        """The end marker."""
        self._sink.write(b"\0" * END_SIZE)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, _MODE, 0
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % BLOCK
