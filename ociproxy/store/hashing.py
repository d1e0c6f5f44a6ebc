"""Hashing: of a whole file, and of pieces in order, by a thread beside the caller's work.

Tests: tests/fetch/download/test_hasher.py, tests/store/test_writer.py.
"""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Final

from ociproxy.store.files import READ_SIZE, read_buffer

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.digest import Hasher

BEHIND: Final = 7
"""Pieces that the thread may be behind its caller. A caller may fill a buffer again once it has
given this many others."""

_Piece = tuple["bytes | memoryview", "tuple[Hasher, ...]"]


def hash_file(file: FileIO, hasher: Hasher) -> int:
    """Hash the rest of the file; returns its size in bytes."""
    size = 0
    buffer = read_buffer(READ_SIZE)
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
        size += count
    return size


class Hashing:
    """A thread that hashes pieces in the order in which they are given. Only one thread at a time
    calls its methods."""

    def __init__(self, name: str, *, behind: int = BEHIND) -> None:
        """Raises RuntimeError if the system starts no thread."""
        # The piece that the thread works on is not in the queue any more.
        self._pieces: Queue[_Piece | None] = Queue(behind - 1)
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def update(self, data: bytes | memoryview, *hashers: Hasher) -> None:
        """Give the thread a piece; waits while it is `behind` pieces late."""
        self._pieces.put((data, hashers))

    def wait(self) -> None:
        """Wait until all pieces given so far are hashed."""
        self._pieces.join()

    def close(self) -> None:
        """Hash the pieces that wait, then end the thread. May be called twice."""
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            data, hashers = piece
            for hasher in hashers:
                hasher.update(data)
            self._pieces.task_done()
