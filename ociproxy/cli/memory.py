"""The C library's memory, for processes that download.

A connection brings a piece of 1 MiB at a time. By default glibc gives that memory back to the
kernel as soon as it is free, and asks for it again with the next piece: the kernel clears each page
anew, which cost a fifth of the processor time of a download (measured over TLS).

Other C libraries than glibc have no such settings, and none are made.
"""

from __future__ import annotations

import ctypes
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
"""The numbers of mallopt(3)."""

_KEPT: Final = 8 * 1024 * 1024
"""Bytes that each arena keeps when they are free."""
_LARGEST: Final = 4 * 1024 * 1024
"""Bytes from which a piece of memory is asked of the kernel alone, and given back at once."""
_ARENAS: Final = 4
"""All threads share so many: by default eight for each processor, which keep 2 MiB each after the
first piece. So no more is kept than on two processors without these settings."""


def keep_pieces() -> None:
    """For the whole process; before it starts threads."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in (
            (_ARENA_MAX, _ARENAS),
            (_MMAP_THRESHOLD, _LARGEST),
            (_TRIM_THRESHOLD, _KEPT),
        ):
            mallopt(setting, value)
