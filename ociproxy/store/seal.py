"""What the name and the times of a stored file say: its digest, its seal, its last use.

A *seal* says "these bytes were verified". The microseconds of the file's mtime are made from its
name, its size and the seconds of its mtime. A later write moves the mtime and so breaks the seal;
`cp -a` and `rsync -a` keep it. There is no second file that could say something else.

The atime is the last use of a file. This program sets it, not the kernel.
"""

from __future__ import annotations

import errno
import os
from hashlib import blake2s
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest

TOUCH_AFTER: Final = 60.0
"""Seconds between two records of a use, so that a hot file is not written to at each request."""
UNTOUCHABLE: Final = frozenset({errno.EROFS, errno.EPERM, errno.EACCES})
"""How setting the times of a file fails if another user owns it, or the store is read-only."""


def file_name(digest: Digest) -> str:
    """`<hex>` for sha256, `<algorithm>-<hex>` for the rest."""
    if digest.algorithm == "sha256":
        return digest.encoded
    return f"{digest.algorithm}-{digest.encoded}"


def seal(file: int, name: str) -> None:
    """Mark an open file as verified under this name. Raises OSError."""
    state = os.fstat(file)
    seconds = state.st_mtime_ns // 10**9
    mtime = seconds * 10**9 + _seal_microseconds(name, state.st_size, seconds) * 1000
    os.utime(file, ns=(state.st_atime_ns, mtime))


def is_sealed(state: os.stat_result, name: str) -> bool:
    """Whether the file was verified under this name and not written to since."""
    seconds, nanoseconds = divmod(state.st_mtime_ns, 10**9)
    return nanoseconds == _seal_microseconds(name, state.st_size, seconds) * 1000


def touch(file: int, state: os.stat_result, now: float) -> None:
    """Record a use at `now` (seconds since the epoch) and keep the seal. A read-only store records
    none. Raises OSError."""
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
