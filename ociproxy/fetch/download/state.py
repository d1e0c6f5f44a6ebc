"""How far a download is. Tests: tests/fetch/download/test_fill.py."""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    """How far a download is. It only moves forward."""

    STARTING = 0
    """The size is not known; readers wait for it."""
    ARRIVING = 1
    """Readers may read what has arrived; the size is known, or will not be before the end."""
    WHOLE = 2
    """All bytes are in the file. The digest is not compared yet."""
    VERIFIED = 3
    """The bytes are right; readers may read the last byte."""
