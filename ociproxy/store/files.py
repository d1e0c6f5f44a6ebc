"""File primitives of the store: names, locks, publication, translation of OSError.

Publication is stage -> fsync -> seal -> rename -> fsync directory, so a reader sees a whole file
or none and a power cut costs at most what was in flight.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ociproxy.errors import StoreError, StoreFull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ociproxy.oci.digest import Digest

READ_SIZE: Final = 1024 * 1024


def read_buffer(size: int) -> memoryview:
    """Memory to read files into, from the beginning of a page on.

    That of a large bytearray begins 16 bytes later, where a copy out of the page cache takes four
    times as long on some processors (measured: 2.2 instead of 8.9 GB/s on an AMD EPYC).
    """
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def file_name(digest: Digest) -> str:
    """`<hex>` for sha256, `<algorithm>-<hex>` for the rest."""
    if digest.algorithm == "sha256":
        return digest.encoded
    return f"{digest.algorithm}-{digest.encoded}"


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """The one translation of OSError: raises StoreFull or StoreError, naming the path."""
    try:
        yield
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(path, reason) from exc
        raise StoreError(path, reason) from exc


def publish(staged: Path, target: Path, *, flush: bool = True) -> None:
    """Move a complete, verified, fsynced and sealed file to the name that readers look for.

    Without `flush` the caller flushes the directory, once for many files.
    """
    make_folder(target.parent)
    staged.replace(target)
    if flush:
        fsync_directory(target.parent)


def try_lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """False where another open file, of this process or another, holds the lock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one of this name. Between an open and a lock another process may
    have moved or replaced it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def identity(state: os.stat_result) -> tuple[int, int, int]:
    """Equal only for a file that was not replaced or written to in between."""
    return state.st_ino, state.st_size, state.st_mtime_ns


def make_folder(path: Path) -> None:
    """With its parents. Each parent is flushed, for a power cut must not take away a folder with
    what was published in it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
