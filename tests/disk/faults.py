"""What the disk can be told to do wrong: which of its operations fail, hang or kill."""

from __future__ import annotations

import errno
import fnmatch
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CHANGES = (
    "create", "mkdir", "write", "truncate", "link", "unlink", "rmdir", "rename", "chmod", "utimens",
)  # fmt: skip
"""Operations that change what is on the disk."""
LOOKS = ("getattr", "open", "opendir", "read")
FLUSHES = ("fsync", "fsyncdir")


@dataclass(frozen=True, slots=True)
class DiskFault:
    errors: Mapping[str, int]
    """The error number of each operation that fails."""
    full: bool = False
    """Whether the disk says that it has no room."""


def _all(names: tuple[str, ...], number: int) -> dict[str, int]:
    return dict.fromkeys(names, number)


FAULTS = {
    "ENOSPC": DiskFault(_all(("create", "mkdir", "write", "link"), errno.ENOSPC), full=True),
    "EDQUOT": DiskFault(_all(("create", "mkdir", "write", "link"), errno.EDQUOT)),
    "EROFS": DiskFault(_all((*CHANGES, "open to write"), errno.EROFS)),
    "EIO on read": DiskFault(_all(("read",), errno.EIO)),
    "EIO on write": DiskFault(_all(("write", *FLUSHES), errno.EIO)),
    "no inodes": DiskFault(_all(("create", "mkdir"), errno.ENOSPC)),
    "permission lost": DiskFault(_all((*CHANGES, *LOOKS), errno.EACCES)),
}
HEALTHY = DiskFault({})


class Switch:
    """What the disk does wrong now. Thread-safe."""

    def __init__(self) -> None:
        self._fault = HEALTHY
        self._pattern = "*"
        self._hung: tuple[str, ...] = ()
        self._waiting = 0
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._fatal = 0
        self._sound = 0
        self._count = 0

    @property
    def is_full(self) -> bool:
        return self._fault.full and self._count >= self._sound

    def fail(self, name: str, pattern: str, step: int) -> None:
        """From now on operations fail on paths that fit; with a `step` only once that many changes
        and flushes were made. With an empty name none fails."""
        with self._lock:
            self._pattern = pattern
            self._fault = FAULTS[name] if name else HEALTHY
            self._sound = step
            self._count = 0

    def hang(self, operations: Sequence[str], pattern: str) -> None:
        """These operations, on paths that fit, do not return until `release`."""
        self._released.clear()
        self._pattern = pattern
        self._hung = tuple(operations)

    def release(self) -> None:
        self._hung = ()
        self._released.set()

    def waiting(self) -> int:
        """How many operations hang now."""
        return self._waiting

    def kill_at(self, step: int) -> None:
        """The process that is about to make this change or flush, counted from now on, is killed;
        0 kills none."""
        with self._lock:
            self._fatal = step
            self._count = 0

    def steps(self) -> int:
        """Changes and flushes since the last `fail` or `kill_at`."""
        return self._count

    def begin(self, operation: str, path: str, process: int) -> None:
        """Raises OSError where the operation is to fail."""
        # The mount point itself stays, or the disk could not be unmounted.
        fits = path != "/" and fnmatch.fnmatchcase(path, self._pattern)
        if fits and operation in self._hung:
            with self._lock:
                self._waiting += 1
            self._released.wait()
            with self._lock:
                self._waiting -= 1
        changes = operation in CHANGES or operation in FLUSHES
        with self._lock:
            self._count += changes
            killed = changes and self._count == self._fatal
            failing = self._count >= self._sound + changes
            number = self._fault.errors.get(operation) if failing else None
        if fits and number is not None:
            raise OSError(number, os.strerror(number))
        if killed:
            os.kill(process, signal.SIGKILL)
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
