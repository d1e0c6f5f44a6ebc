"""Claims: of all processes that share a store, the one that does some kind of work.

The owner locks a file in `locks/`, and touches it from time to time. One that was stopped does not:
then another process puts a new file in its place, and the owner finds that out before it goes on.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.store.files import Silence, heartbeat, is_at, store_errors, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOCKS_MODE: Final = 0o770
"""Of `locks/`, less the umask. A user who may read a file may lock it, and so hold up all that the
store does: other users may not, but the group may that can share a store."""
TOUCH: Final = 10.0
"""Seconds between two touches of an owner that has nothing to do: each one is a write to the disk,
all day long."""
SILENT: Final = 30.0
"""Seconds. An owner that has not touched its claim for so long was stopped, or its disk hangs."""


def close_lock_folder(path: Path) -> None:
    """Close `locks/` of an earlier version to other users. One who may not is no danger to it."""
    with suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & ~LOCKS_MODE:
            path.chmod(mode & LOCKS_MODE)


class Claim:
    """Belongs to one thread; `close` it."""

    def __init__(self, path: Path, open_lock: Callable[[str], int]) -> None:
        """`open_lock` opens a file of `locks/` by its name, and makes it where it is missing."""
        self._path = path
        self._open_lock = open_lock
        self._file: int | None = None
        self._silence: Silence | None = None
        self._owned = False
        self._touched = 0.0

    def take(self) -> bool:
        """Whether this process is the owner now. Never waits; call it again and again, twice a
        second or so. Raises StoreError."""
        if self.is_held():
            return True
        with store_errors(self._path):
            if self._file is None or not is_at(self._file, self._path):
                self.close()
                self._file = self._open_lock(self._path.name)
                self._silence = Silence(self._file, SILENT)
            if try_lock(self._file):
                self._owned = True
                self._touch()
                return self.is_held()
            if self._silence is not None and self._silence.is_long():
                self._replace(self._file)
        return False

    def is_held(self) -> bool:
        """Whether this process is the owner still. Ask before each piece of work, and every few
        seconds. Raises StoreError."""
        if not self._owned or self._file is None:
            return False
        with store_errors(self._path):
            if not is_at(self._file, self._path):
                self.close()
                return False
        if time.monotonic() - self._touched > TOUCH:
            self._touch()
        return True

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the owner need not ask: another thread touches the claim."""
        file = self._file
        if file is None or not self._owned:
            yield
            return
        heartbeat.start(file)
        try:
            yield
        finally:
            heartbeat.stop(file)

    def close(self) -> None:
        """Give it up."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._silence, self._owned = None, None, False

    def _touch(self) -> None:
        self._touched = time.monotonic()
        if self._file is not None:
            with suppress(OSError):  # on a disk that is mounted read-only nothing is done, either
                os.utime(self._file)

    def _replace(self, file: int) -> None:
        """Take the claim's name from an owner that is silent: the next `take` makes a new file."""
        guard = self._open_lock("deposing")
        try:
            # Another process does it, or has done it.
            if try_lock(guard) and is_at(file, self._path):
                with suppress(OSError):
                    self._path.unlink()
                    log.event(logging.WARNING, "taken over", work=self._path.name, silent=SILENT)
        finally:
            os.close(guard)
