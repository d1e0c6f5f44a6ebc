"""The loads, imports and exports that run on the store: what they may need stays.

Each holds a file in `pulls/` (`Staging.using`), and touches it. One that was stopped, with its
terminal, its container or its machine, does not: it keeps nothing any more until it goes on.
Tests: tests/cli/test_prune_beside.py.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Final

from ociproxy.store.claim import SILENT
from ociproxy.store.files import TOUCH_AFTER, store_errors, try_lock
from ociproxy.store.staging import USING

if TYPE_CHECKING:
    from pathlib import Path

_WATCH: Final = 3.0
"""Seconds in which a process that works touches its file, also where a beat or two are late."""


class Users:
    def __init__(self, folder: Path) -> None:
        """`folder` is `pulls/`. Where a process may have been stopped, blocks for `_WATCH`. Raises
        StoreError."""
        self._folder = folder
        self._stopped = self._find_stopped()

    def since(self) -> float:
        """Since when content that was used may be needed, in seconds since the epoch; infinite
        where no process runs. Those that were stopped count if they went on. Raises StoreError."""
        running = self._look().items() - self._stopped.items()
        # A use is not recorded so soon after the one before it.
        return min((_since(*each) for each in running), default=inf) - TOUCH_AFTER

    def _find_stopped(self) -> dict[str, int]:
        limit = SILENT * 10**9
        silent = {
            name: touched
            for name, touched in self._look().items()
            if abs(time.time_ns() - touched) > limit and _is_touched(name)
        }
        if not silent:
            return {}
        # The machine may have slept, or its clock was set: a process that works touches it now.
        time.sleep(_WATCH)
        return dict(silent.items() & self._look().items())

    def _look(self) -> dict[str, int]:
        """The names of the files, and when each was touched last, in nanoseconds since the
        epoch."""
        found = {}
        with store_errors(self._folder):
            for path in self._folder.glob(f"{USING}*"):
                with suppress(FileNotFoundError), path.open("rb") as file:
                    if not try_lock(file.fileno(), fcntl.LOCK_SH):
                        found[path.name] = os.fstat(file.fileno()).st_mtime_ns
        return found


def _is_touched(name: str) -> bool:
    """False for the file of an older version: there the mtime says since when."""
    return "-" in name.removeprefix(USING)


def _since(name: str, touched: int) -> float:
    since = int(name.removeprefix(USING).partition("-")[0]) if _is_touched(name) else touched
    return since / 10**9
