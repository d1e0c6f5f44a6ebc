"""Writing a file from front to end, the disk beginning early.

The kernel keeps what is written in memory until it must, or is told to, and so does the disk, or
what stands for one on a virtual machine: an fsync at the end of a large file then waits for all of
it. Told on the way, both work beside the writer.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

_EVERY: Final = 8 * 1024 * 1024
"""Bytes after which the kernel is told: large enough for the disk's queue, soon over at an
fsync."""
_FLUSH_EVERY: Final = 64 * 1024 * 1024
"""Bytes after which the disk is told, and somebody waits for it."""
_WRITE_SIZE: Final = 128 * 1024
"""Bytes given to the kernel in one call, as cp does: for more it looks for larger pieces of memory,
which is dear on virtual machines."""
_NO_DISK: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EROFS})
"""What a flush of a pipe or a device fails with."""


class SequentialWriter:
    """Writes to an open file; what it is not told of, as a seek, is the caller's to avoid. `settle`
    comes before the file is closed, or flushed for the last time."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0
        self._told = 0
        self._flushed = 0
        self._flusher: ThreadPoolExecutor | None = None
        self._flushing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """All of it. Raises OSError, also for what was written before."""
        view = memoryview(data)
        self._written += len(view)
        while view:
            view = view[os.write(self._file, view[:_WRITE_SIZE]) :]
        if self._written - self._told >= _EVERY:
            # Of pages that wait for the disk this advice starts the writing and drops none. A pipe
            # has no disk, and advice is nothing to fail for.
            with suppress(OSError):
                os.posix_fadvise(
                    self._file, self._told, self._written - self._told, os.POSIX_FADV_DONTNEED
                )
            self._told = self._written
        if self._told - self._flushed >= _FLUSH_EVERY:
            self._flush()

    def settle(self) -> None:
        """Returns when nothing is under way any more. Raises OSError for what could not be written:
        the kernel says so once only, so an fsync afterwards may not."""
        if self._flusher is not None:
            self._flusher.shutdown()
        if self._flushing is not None:
            self._flushing.result()

    def _flush(self) -> None:
        """In a thread, if the last one is over."""
        if self._flushing is not None:
            if not self._flushing.done():
                return
            self._flushing.result()
        if self._flusher is None:
            self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushed = self._told
        self._flushing = self._flusher.submit(_flush_file, self._file)


def _flush_file(file: int) -> None:
    try:
        os.fdatasync(file)
    except OSError as exc:
        if exc.errno not in _NO_DISK:
            raise
