"""The bytes of an archive from front to end: plain, gzip or zstd, from a file or a pipe.

No byte is read twice, and members that the reader skips in a plain file are not read at all. An
archive may be hostile, so its expanded size is bounded, in all and in proportion.

Tests: tests/archive/importer/test_tar_reader.py, tests/archive/importer/test_hostile.py.
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
"""Bytes that an archive may expand to, unless `--max-size` says otherwise: far above any archive,
and a bound for one that never ends."""
_MAX_RATIO: Final = 200
"""Times its own size that an archive may expand to; packed layers expand to about their own size
when they are packed once more."""
_RATIO_FREE: Final = 256 * 1024 * 1024
"""Expanded bytes before the ratio is checked: documents at the front of an archive pack well."""
_MAX_WINDOW: Final = 128 * 1024 * 1024
"""Bytes of memory that a zstd frame may ask for. `zstd --long` asks for as much; `--long=31` asks
for more and is refused."""
_SKIP_SIZE: Final = 1024 * 1024
"""Bytes that are read at once where skipping means reading."""

GZIP: Final = b"\x1f\x8b"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
_HEAD_SIZE: Final = 8
"""Bytes that tell one compression from another."""
_OTHERS: Final = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"LZIP": "lzip",
}


class _Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class ArchiveStream:
    """The expanded bytes. All methods raise LayoutInvalid for an archive that is refused, and
    LayoutDamaged for one that cannot be read any further."""

    def __init__(self, file: BinaryIO, source: str, *, max_size: int = MAX_SIZE) -> None:
        """`file` is unbuffered; the caller closes it."""
        self.source = source
        self.offset = 0
        self._counted = _Counted(file)
        self._max_size = max_size
        head = self._counted.head
        self._reader: _Reader = self._counted
        self._seekable: int | None = None
        if head.startswith(GZIP):
            self._reader = gzip.GzipFile(fileobj=cast("BinaryIO", self._counted), mode="rb")
        elif head.startswith(ZSTD):
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
        """Bytes of the file that have been read or skipped."""
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
        """`count` bytes, or fewer where the stream ends."""
        return read(self, count)

    def skip(self, count: int) -> bool:
        """Skip `count` bytes; False where the stream ends before."""
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
    """Counts the bytes of a file; the head that told the compression is put back in front."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = self._front = read(cast("io.RawIOBase", file), _HEAD_SIZE)
        self.count = 0

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
        """Only where the file can seek."""
        front = min(count, len(self._front))
        self._front = self._front[front:]
        self._file.seek(count - front, io.SEEK_CUR)
        self.count += count
