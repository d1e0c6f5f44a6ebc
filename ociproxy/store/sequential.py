"""Writing a file from front to end, the disk beginning early.

The kernel keeps what is written in memory until it must, or is told to: an fsync at the end of a
large file then waits for all of it. Told on the way, the disk works beside the writer.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

_EVERY: Final = 8 * 1024 * 1024
"""Bytes after which the disk is told: large enough for its queue, soon over at an fsync."""
WRITE_SIZE: Final = 128 * 1024
"""Bytes given to the kernel in one call, as cp does: for more it looks for larger pieces of memory,
which is dear on virtual machines."""


class SequentialWriter:
    """Writes to an open file; what it is not told of, as a seek, is the caller's to avoid."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0
        self._told = 0

    def write(self, data: bytes | memoryview) -> None:
        """All of it. Raises OSError."""
        view = memoryview(data)
        self._written += len(view)
        while view:
            view = view[os.write(self._file, view[:WRITE_SIZE]) :]
        if self._written - self._told >= _EVERY:
            # Of pages that wait for the disk this advice starts the writing and drops none. A pipe
            # has no disk, and advice is nothing to fail for.
            with suppress(OSError):
                os.posix_fadvise(
                    self._file, self._told, self._written - self._told, os.POSIX_FADV_DONTNEED
                )
            self._told = self._written
