"""Writes a tar in the GNU format: regular files with their names and bytes, one after the other.

PAX would not do: some readers ignore its records, and take a blob over 8 GiB for an empty one.
Times, owners and modes are constant, so that equal content makes equal bytes.

Tests: tests/archive/export/test_export.py.
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

    from ociproxy.archive.export.output import Output

_BLOCK: Final = tarfile.BLOCKSIZE
END_SIZE: Final = 2 * _BLOCK
"""Bytes of the end mark: two blocks of zeros (POSIX.1, ustar)."""
_MODE: Final = 0o644

_BUFFERS: Final = BEHIND + 1
"""One to read into while the hashing thread has the others."""
_BUFFER_SIZE: Final = 256 * 1024
"""Bytes; times the count of buffers this is 2 MiB, whatever the size of a blob."""


def member_size(name: str, size: int) -> int:
    """Bytes that a member takes in the tar, with header and padding."""
    return len(_header(name, size)) + size + _padding(size)


class TarWriter:
    """Writes members to an output, which hashes in a thread of its own while the next bytes are
    read."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._buffers = [read_buffer(_BUFFER_SIZE) for _ in range(_BUFFERS)]
        self._next = 0

    def add(self, name: str, data: bytes) -> None:
        self._output.write(_header(name, len(data)))
        self._output.write(data + b"\0" * _padding(len(data)))

    def add_file(self, name: str, source: RawIOBase, digest: Digest, size: int) -> None:
        """Copy `size` bytes of the source, which must have this digest. Raises SizeMismatch or
        DigestMismatch, after which the tar is to be thrown away."""
        self._output.write(_header(name, size))
        hasher = digest.hasher()
        left = size
        while left:
            buffer = self._buffers[self._next]
            self._next = (self._next + 1) % _BUFFERS
            count = source.readinto(buffer[: min(left, _BUFFER_SIZE)])
            if not count:
                raise SizeMismatch(f"stored blob {digest}", size, size - left)
            self._output.write(buffer[:count], hasher)
            left -= count
        self._output.settle()
        actual = Digest.finish(hasher, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(f"stored blob {digest}", digest, actual)
        self._output.write(b"\0" * _padding(size))

    def finish(self) -> None:
        """Write the end mark."""
        self._output.write(b"\0" * END_SIZE)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, _MODE, 0
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % _BLOCK
