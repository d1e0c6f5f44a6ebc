"""The file of an archive, or standard output: hashed on the way, and named only when whole."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import zstandard

from ociproxy.errors import OutputError
from ociproxy.oci.digest import Digest
from ociproxy.store.files import fsync_directory, is_at, try_lock
from ociproxy.store.hashing import Hashing
from ociproxy.store.sequential import SequentialWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.oci.digest import Hasher

STDOUT: Final = Path("-")

_ZSTD_LEVEL: Final = 3
"""zstd's own default: layers are compressed already, and a higher level gains next to nothing."""
_ZSTD_WINDOW_LOG: Final = 25
"""Power of two: 32 MiB, the largest window that k3s and rke2 read."""
_ZSTD_THREADS: Final = 2
"""Beside the two threads that write and hash; more would starve a small machine."""


@dataclass(frozen=True, slots=True)
class Written:
    """A file with its size in bytes and its digest; `tar_digest` is that of the tar inside it,
    which differs where the file is compressed."""

    path: Path
    size: int
    digest: Digest
    tar_digest: Digest


class Output:
    """A file that is called `<name>.tmp` until `commit`; `-` is standard output.

    A thread of its own hashes what is written: for the digest of the tar and, while the data is in
    the processor's cache, for the hasher of the caller.
    """

    def __init__(self, path: Path, file: int, *, zstd: bool) -> None:
        self.path = path
        self.size = 0
        self._file = file
        self._writing = SequentialWriter(file)
        self._tar_hash = hashlib.sha256()
        self._file_hash = hashlib.sha256() if zstd else self._tar_hash
        self._hashing = Hashing("export-hash")
        self._compressor = _compressor() if zstd else None

    def write(self, data: bytes | memoryview, hasher: Hasher | None = None) -> None:
        """Write the data, and have `hasher` updated with it. The caller leaves the data alone until
        it has written BEHIND more pieces, for the thread may still hash it. Raises OutputError."""
        self._hashing.update(data, self._tar_hash, *((hasher,) if hasher else ()))
        if self._compressor is None:
            self._put(data)
        else:
            self._put_packed(self._compressor.compress(data))

    def settle(self) -> None:
        """Wait until each hasher has been updated with all that was written for it."""
        self._hashing.wait()

    def finish(self) -> Written:
        """Write out all that is left, under the temporary name still. Raises OutputError."""
        if self._compressor is not None:
            self._put_packed(self._compressor.flush())
        self._hashing.wait()
        with output_errors(self.path):
            self._writing.settle()
        return Written(
            self.path,
            self.size,
            Digest.finish(self._file_hash, "sha256"),
            Digest.finish(self._tar_hash, "sha256"),
        )

    def tar_digest(self) -> Digest:
        """The digest of what was written of the tar so far."""
        self._hashing.wait()
        return Digest.finish(self._tar_hash, "sha256")

    def commit(self) -> None:
        """Give the finished file its name, durably: after a power cut the name has the whole new
        file or the old one. Raises OutputError."""
        if self.path == STDOUT:
            return
        with output_errors(self.path):
            os.fsync(self._file)
            staged(self.path).replace(self.path)
            fsync_directory(self.path.parent)

    def close(self) -> None:
        self._hashing.close()
        self._writing.close()

    def _put_packed(self, data: bytes) -> None:
        self._file_hash.update(data)
        self._put(data)

    def _put(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        with output_errors(self.path):
            self._writing.write(data)


@contextmanager
def open_output(path: Path, *, zstd: bool = False) -> Iterator[Output]:
    """A file that is not committed is removed at the end. Raises OutputError, also where another
    export writes this file."""
    if path == STDOUT and not sys.stdout:  # Python has none where it is closed
        raise OutputError(path, "standard output is closed")
    with output_errors(path):
        file = os.dup(sys.stdout.fileno()) if path == STDOUT else _own(path)
    output = Output(path, file, zstd=zstd)
    try:
        yield output
    finally:
        try:
            # After a commit there is no file of the temporary name, or that of another export.
            with suppress(OSError):
                if path != STDOUT and is_at(file, staged(path)):
                    staged(path).unlink()
        finally:
            output.close()


def write_small(path: Path, data: bytes) -> None:
    """Write a small file beside the archive, whole or not at all. Raises OutputError."""
    with output_errors(path):
        temporary = staged(path)
        # In a folder that other users may write to, the name may be a link that leads anywhere.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)


def staged(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Translates OSError to OutputError wherever an archive is written."""
    try:
        yield
    except OSError as exc:
        raise OutputError(path, (exc.strerror or str(exc)).lower()) from exc


def _own(path: Path) -> int:
    """The temporary file, open, locked and empty. One that a killed export left is taken over.

    Raises OutputError where another export has it locked, or where `path` is no regular file;
    OSError.
    """
    if path.is_dir():
        raise OutputError(path, "is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        # `commit` replaces the file of this name, which must not be a device or a pipe.
        raise OutputError(path, "is not a regular file; write to - and redirect it")
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(staged(path), flags, 0o666)
        try:
            if not try_lock(file):
                raise OutputError(path, "another export writes it now")
            # Between the open and the lock another export may have given this file its name.
            if is_at(file, staged(path)):
                os.ftruncate(file, 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _compressor() -> zstandard.ZstdCompressionObj:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL, window_log=_ZSTD_WINDOW_LOG, threads=_ZSTD_THREADS, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compressobj()
