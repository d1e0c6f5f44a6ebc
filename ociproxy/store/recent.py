"""Files that other processes wrote a moment ago, made durable by a command that reports them."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_WRITTEN_BACK: Final = 600.0
"""Seconds after which the kernel has long written a file to the disk; by itself it waits for 30."""
_FLUSHED: Final = 65_536
"""Files and folders that are remembered as flushed; images share many."""


class RecentFiles:
    """A flush of each file may take a turn of the disk: only those are flushed that changed within
    `_WRITTEN_BACK` seconds, and each once while it stays the same."""

    def __init__(self) -> None:
        self._flushed: BoundedCache[Path, int] = BoundedCache(_FLUSHED)
        """Times of change, in nanoseconds."""

    def flush(self, paths: Iterable[Path]) -> None:
        """Return when these files and their names are on the disk. Paths that do not exist are
        passed over. Blocks. Raises StoreError."""
        folders = {path.parent: None for path in paths if self._flush(path)}
        for folder in folders:
            self._flush(folder)

    def _flush(self, path: Path) -> bool:
        """Whether the file or folder changed a moment ago; then it is flushed."""
        with store_errors(path), suppress(FileNotFoundError):
            # A file that is opened and not read has not been used.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                changed = os.fstat(file).st_ctime_ns
                if time.time() - changed / 1e9 >= _WRITTEN_BACK:
                    return False
                if self._flushed.get(path) != changed:
                    os.fsync(file)
                    self._flushed.put(path, changed)
                return True
            finally:
                os.close(file)
        return False
