"""An archive's bytes from front to end: plain, gzip or zstd, out of a file or a pipe.

Nothing is ever read twice, and what a plain file need not give up is skipped, not read. An archive
is hostile until shown otherwise: what it expands to is bounded, in all and in proportion.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from typing import TYPE_CHECKING, Final, Protocol, cast

import zstandard

from ociproxy.errors import LayoutDamaged, LayoutInvalid
from ociproxy.store.reader import read

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_SIZE: Final = 16 * 1024**4
"""Bytes that an archive may expand to, unless told otherwise."""
_MAX_RATIO: Final = 200
"""How far an archive may expand, in proportion; layers, packed once more, come to about 1."""
_RATIO_FREE: Final = 256 * 1024 * 1024
"""Bytes that may come before the proportion counts."""
_MAX_WINDOW: Final = 128 * 1024 * 1024
"""Bytes of memory that a zstd frame may ask for: `zstd --long`, and no more."""
_SKIP_SIZE: Final = 1024 * 1024

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_OTHERS: Final = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


class _Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class ArchiveStream:
    """The expanded bytes. Raises LayoutInvalid for what is refused, LayoutDamaged for what is
    broken from here on."""

    def __init__(self, file: BinaryIO, source: str, *, max_size: int = MAX_SIZE) -> None:
        """`file` is unbuffered and stays the caller's."""
        self.source = source
        self.offset = 0
        self._counted = _Counted(file)
        self._max_size = max_size
        head = _head(self._counted)
        self._reader: _Reader = self._counted
        self._seekable: int | None = None
        if head.startswith(_GZIP):
            self._reader = gzip.GzipFile(fileobj=cast("BinaryIO", self._counted), mode="rb")
        elif head.startswith(_ZSTD):
            unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
            self._reader = cast(
                "_Reader",
                unpacker.stream_reader(cast("BinaryIO", self._counted), read_across_frames=True),
            )
        else:
            for magic, name in _OTHERS.items():
                if head.startswith(magic):
                    raise LayoutInvalid(source, f"is packed with {name}: unpack it first")
            state = os.fstat(file.fileno())
            if stat.S_ISREG(state.st_mode):
                self._seekable = state.st_size

    @property
    def consumed(self) -> int:
        """Bytes of the file that are done with: how far this has come."""
        return self._counted.count

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            count = self._reader.readinto(buffer) or 0
        except (zlib.error, gzip.BadGzipFile, EOFError, zstandard.ZstdError) as exc:
            raise LayoutDamaged(self.source, f"damaged compression: {exc}") from exc
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise LayoutDamaged(self.source, f"cannot be read: {reason}") from exc
        self.offset += count
        self._check_size()
        return count

    def read(self, count: int) -> bytes:
        """Exactly so many bytes, or those up to the end."""
        return read(self, count)

    def skip(self, count: int) -> bool:
        """Leave out so many bytes; False where the end came first."""
        if self._seekable is not None:
            if self.offset + count > self._seekable:
                return False
            self._counted.skip(count)
            self.offset += count
            self._check_size()
            return True
        buffer = memoryview(bytearray(min(count, _SKIP_SIZE)))
        while count:
            got = self.readinto(buffer[: min(count, len(buffer))])
            if not got:
                return False
            count -= got
        return True

    def _check_size(self) -> None:
        if self.offset > self._max_size:
            raise LayoutInvalid(
                self.source, f"expands to more than {self._max_size} bytes: see --max-size"
            )
        if self.offset > max(_RATIO_FREE, _MAX_RATIO * self.consumed):
            raise LayoutInvalid(
                self.source, f"expands to more than {_MAX_RATIO} times its size: refused as a bomb"
            )


class _Counted:
    """The file, with the bytes looked at first put back in front of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._front = b""
        self.count = 0

    def put_back(self, data: bytes) -> None:
        self._front = data
        self.count -= len(data)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = _SKIP_SIZE
        data, self._front = self._front[:size], self._front[size:]
        data = data or self._file.read(size) or b""
        self.count += len(data)
        return data

    def readinto(self, buffer: memoryview, /) -> int:
        if self._front:
            data = self.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        count = cast("io.RawIOBase", self._file).readinto(buffer) or 0
        self.count += count
        return count

    def skip(self, count: int) -> None:
        """Only on a plain file."""
        front = min(count, len(self._front))
        self._front = self._front[front:]
        self._file.seek(count - front, io.SEEK_CUR)
        self.count += count


def _head(file: _Counted) -> bytes:
    head = b""
    while len(head) < 8 and (more := file.read(8 - len(head))):
        head += more
    file.put_back(head)
    return head
