"""Seals and last uses: what the times of a stored file say.

A *seal* says "these bytes were verified": the microseconds of the file's mtime are a function of
its name, its size and the mtime's seconds. Any later write moves the mtime and so breaks the seal;
`cp -a` and `rsync -a` keep it. It needs no second file that could disagree, and no memory.

The atime is the last use of a file, written by us and not by the kernel.
"""

from __future__ import annotations

import errno
import os
from hashlib import blake2s
from typing import Final

TOUCH_AFTER: Final = 60.0
"""Seconds: last use (atime) is written at most this often."""
UNTOUCHABLE: Final = frozenset({errno.EROFS, errno.EPERM, errno.EACCES})
"""What setting a file's times fails with where another user owns the store, or it is read-only."""


def seal(file: int, name: str) -> None:
    """Mark an open file as verified under this name."""
    state = os.fstat(file)
    seconds = state.st_mtime_ns // 10**9
    mtime = seconds * 10**9 + _seal_microseconds(name, state.st_size, seconds) * 1000
    os.utime(file, ns=(state.st_atime_ns, mtime))


def is_sealed(state: os.stat_result, name: str) -> bool:
    """Whether the file is as it was when it was verified under this name."""
    seconds, nanoseconds = divmod(state.st_mtime_ns, 10**9)
    return nanoseconds == _seal_microseconds(name, state.st_size, seconds) * 1000


def touch(file: int, state: os.stat_result, now: float) -> None:
    """Record the last use as the atime, leaving the seal alone. A read-only store keeps none."""
    if now - state.st_atime < TOUCH_AFTER:
        return
    try:
        os.utime(file, ns=(int(now * 10**9), state.st_mtime_ns))
    except OSError as exc:
        if exc.errno not in UNTOUCHABLE:
            raise


def _seal_microseconds(name: str, size: int, seconds: int) -> int:
    digest = blake2s(f"{name} {size} {seconds}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10**6
