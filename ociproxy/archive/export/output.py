"""The file an archive is written to: hashed on the way, and under its name only when whole."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

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
_ZSTD_WINDOW_LOG: Final = 25
"""32 MiB: the most that k3s and rke2 read."""
_ZSTD_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Written:
    """`digest` is the file's; that of the plain tar inside it is `tar_digest`."""

    path: Path
    size: int
    digest: Digest
    tar_digest: Digest


class Sink(Protocol):
    """Where the bytes of a tar go; data may be read until BEHIND more pieces were written."""

    def write(self, data: bytes | memoryview, hasher: Hasher | None = None) -> None:
        """The hasher is given the data too."""

    def settle(self) -> None:
        """Wait until every hasher has what was written."""


class Output:
    """A file under `<name>.tmp` until `commit`; `-` is standard output, which has no name.

    What is written is hashed beside the writing, by a thread of its own: once for the tar and,
    while it is in the processor's cache, once more for whoever gave it.
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
        """Raises OutputError."""
        self._hashing.update(data, self._tar_hash, *((hasher,) if hasher else ()))
        if self._compressor is None:
            self._put(data)
        else:
            self._put_packed(self._compressor.compress(data))

    def settle(self) -> None:
        self._hashing.wait()

    def finish(self) -> Written:
        """Everything is in the file, though not yet under its name. Raises OutputError."""
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

    def peek(self) -> Digest:
        """The digest of the tar up to here."""
        self._hashing.wait()
        return Digest.finish(self._tar_hash, "sha256")

    def commit(self) -> None:
        """Give the finished file its name; a power cut leaves it whole or under its old name."""
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
    """Raises OutputError. What is not committed in the end is removed."""
    if path == STDOUT:
        with output_errors(path):
            file = os.dup(sys.stdout.fileno())
        output = Output(path, file, zstd=zstd)
        try:
            yield output
        finally:
            output.close()
        return
    with output_errors(path):
        if path.is_dir():
            raise OutputError(path, "is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            # The finished file takes the place of what has the name: not of a device or a pipe.
            raise OutputError(path, "is not a regular file; write to - and redirect it")
        file = _own(path)
    output = Output(path, file, zstd=zstd)
    try:
        yield output
    finally:
        try:
            # After a commit the file is there under its name only.
            with suppress(OSError):
                if is_at(file, staged(path)):
                    staged(path).unlink()
        finally:
            output.close()


def write_small(path: Path, data: bytes) -> None:
    """A sidecar, whole or not at all. Raises OutputError."""
    with output_errors(path):
        temporary = staged(path)
        # In a folder that others may write to, the name may lead anywhere.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)


def staged(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """The one translation of OSError where an archive is written."""
    try:
        yield
    except OSError as exc:
        raise OutputError(path, (exc.strerror or str(exc)).lower()) from exc


def _own(path: Path) -> int:
    """The staged file, locked and empty: what a killed export left is in nobody's way; what another
    one writes is. Raises OutputError or OSError."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(staged(path), flags, 0o666)
        try:
            if not try_lock(file):
                raise OutputError(path, "another export writes it now")
            # Between the two another export may have finished it: then it has its own name now.
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
