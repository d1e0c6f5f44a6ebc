"""Writing a file from front to end, so that the disk begins early.

The kernel keeps written bytes in memory until it must write them, or is told to. So does the disk,
or the host of a virtual machine. An fsync at the end of a large file then waits for all of it. Told
on the way, both work beside the writer.
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
"""Bytes after which the disk is told, by a thread that waits for it."""
_WRITE_SIZE: Final = 128 * 1024
"""Bytes given to the kernel in one call, as cp does: for more it looks for larger pieces of memory,
which is dear on virtual machines."""
_NO_DISK: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
"""What a flush of a pipe or a device fails with."""


class SequentialWriter:
    """Owns an open file from now on. The caller does not seek in it, and calls `settle` before the
    last fsync."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0
        self._told = 0
        self._flushed = 0
        self._flushing: Thread | None = None
        self._failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it. Raises OSError, also for bytes that were written before."""
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
        """Return when no flush is under way. Raises OSError for bytes that could not be written:
        the kernel reports that once, so a later fsync may not."""
        if self._flushing is not None:
            self._flushing.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """At once, without an error for bytes that could not be written."""
        os.close(self._file)

    def _start_flush(self) -> None:
        """Flush in a thread, if the last one has ended."""
        if self._flushing is not None and self._flushing.is_alive():
            return
        self.settle()
        # A descriptor of its own: the owner may close the file meanwhile.
        file = os.dup(self._file)
        flushing = Thread(target=self._flush, args=(file,), name="flush", daemon=True)
        try:
            flushing.start()
        except RuntimeError:
            os.close(file)
            return  # the system gives no thread: the fsync at the end waits longer
        self._flushing, self._flushed = flushing, self._told

    def _flush(self, file: int) -> None:
        try:
            os.fdatasync(file)
        except OSError as exc:
            if exc.errno not in _NO_DISK:
                self._failure = exc
        finally:
            os.close(file)
