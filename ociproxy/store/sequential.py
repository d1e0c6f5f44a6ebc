"""Writing a file from front to end, the disk beginning early.

The kernel keeps what is written in memory until it must, or is told to, and so does the disk, or
what stands for one on a virtual machine: an fsync at the end of a large file then waits for all of
it. Told on the way, both work beside the writer.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from threading import Thread
from typing import Final

_EVERY: Final = 8 * 1024 * 1024
"""Bytes after which the kernel is told: large enough for the disk's queue, soon over at an
fsync."""
_FLUSH_EVERY: Final = 64 * 1024 * 1024
"""Bytes after which the disk is told, and somebody waits for it."""
_WRITE_SIZE: Final = 128 * 1024
"""Bytes given to the kernel in one call, as cp does: for more it looks for larger pieces of memory,
which is dear on virtual machines."""
_NO_DISK: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
"""What a flush of a pipe or a device fails with."""


class SequentialWriter:
    """Writes to an open file, which is its own from now on; what it is not told of, as a seek, is
    the caller's to avoid. `settle` comes before the file is flushed for the last time."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0
        self._told = 0
        self._flushed = 0
        self._flushing: Thread | None = None
        self._failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> None:
        """All of it. Raises OSError, also for what was written before."""
        view = memoryview(data)
        self._written += len(view)
        while view:
            view = view[os.write(self._file, view[:_WRITE_SIZE]) :]
        if self._written - self._told >= _EVERY:
            # Of pages that wait for the disk this advice starts the writing, and only what is
            # written already may go. A pipe has no disk, and advice is nothing to fail for.
            with suppress(OSError):
                os.posix_fadvise(
                    self._file, self._told, self._written - self._told, os.POSIX_FADV_DONTNEED
                )
            self._told = self._written
        if self._told - self._flushed >= _FLUSH_EVERY:
            self._start_flush()

    def settle(self) -> None:
        """Returns when nothing is under way any more. Raises OSError for what could not be written:
        the kernel says so once only, so an fsync afterwards may not."""
        if self._flushing is not None:
            self._flushing.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """At once; what could not be written is not said here."""
        os.close(self._file)

    def _start_flush(self) -> None:
        """In a thread, if the last one is over."""
        if self._flushing is not None and self._flushing.is_alive():
            return
        self.settle()
        # With a number of its own, which nobody closes under it.
        file = os.dup(self._file)
        flushing = Thread(target=self._flush, args=(file,), name="flush", daemon=True)
        try:
            flushing.start()
        except RuntimeError:
            os.close(file)
            return  # no thread is to be had: the fsync at the end waits longer
        self._flushing, self._flushed = flushing, self._told

    def _flush(self, file: int) -> None:
        try:
            os.fdatasync(file)
        except OSError as exc:
            if exc.errno not in _NO_DISK:
                self._failure = exc
        finally:
            os.close(file)
