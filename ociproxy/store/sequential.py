"""Writing a file from front to end, so that the disk begins early.

The kernel keeps written bytes in memory until it has to write them, and so does the disk or the
host of a virtual machine. An fsync at the end of a large file then waits for all of them. A writer
that asks for the writing on the way lets kernel and disk work beside it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from threading import Thread
from typing import Final

_EVERY: Final = 8 * 1024 * 1024
"""Bytes after which the kernel is asked to write: enough for the disk's queue, and little to wait
for at an fsync."""
_FLUSH_EVERY: Final = 64 * 1024 * 1024
"""Bytes after which a thread flushes the disk and waits for that, so that the caller need not."""
_WRITE_SIZE: Final = 128 * 1024
"""Bytes given to the kernel in one call, as cp does. For larger calls the kernel looks for larger
pieces of memory, which takes long on virtual machines."""
_NO_DISK: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
"""How the flush of a pipe or a device fails, which has no disk to wait for."""


class SequentialWriter:
    """Owns an open file. The caller does not seek in it, and calls `settle` before the last
    fsync."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0
        self._told = 0
        self._flushed = 0
        self._flushing: Thread | None = None
        self._failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the bytes. Raises OSError, also for bytes of earlier calls."""
        view = memoryview(data)
        self._written += len(view)
        while view:
            view = view[os.write(self._file, view[:_WRITE_SIZE]) :]
        if self._written - self._told >= _EVERY:
            # This advice makes the kernel write pages that wait for the disk, and forget only pages
            # that are written. A pipe takes no advice, and that is no failure.
            with suppress(OSError):
                os.posix_fadvise(
                    self._file, self._told, self._written - self._told, os.POSIX_FADV_DONTNEED
                )
            self._told = self._written
        if self._told - self._flushed >= _FLUSH_EVERY:
            self._start_flush()

    def settle(self) -> None:
        """Wait for the flush that is under way. Raises OSError if bytes could not be written: the
        kernel reports that only once, and a later fsync may succeed."""
        if self._flushing is not None:
            self._flushing.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the file without waiting for a flush."""
        os.close(self._file)

    def _start_flush(self) -> None:
        """Flush in a thread, unless the last flush is still under way."""
        if self._flushing is not None and self._flushing.is_alive():
            return
        self.settle()
        # The thread gets a descriptor of its own, for the owner may close the file meanwhile.
        file = os.dup(self._file)
        flushing = Thread(target=self._flush, args=(file,), name="flush", daemon=True)
        try:
            flushing.start()
        except RuntimeError:
            os.close(file)
            return  # the system starts no thread: the last fsync waits longer
        self._flushing, self._flushed = flushing, self._told

    def _flush(self, file: int) -> None:
        try:
            os.fdatasync(file)
        except OSError as exc:
            if exc.errno not in _NO_DISK:
                self._failure = exc
        finally:
            os.close(file)
