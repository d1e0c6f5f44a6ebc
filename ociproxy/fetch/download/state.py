"""How far a download is, and what it asks of the connections that bring it.

Tests: tests/fetch/download/test_fill.py.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol


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


class Fetcher(Protocol):
    """What brings the bytes of a download that leads: the connections of the HTTP backend."""

    def run(self) -> None:
        """Return when all bytes are in the file. Raises what ended it."""

    def abort(self) -> None:
        """Make `run` end soon; any thread."""

    def help(self) -> None:
        """A reader waits for bytes that no connection is on its way to; any thread."""
