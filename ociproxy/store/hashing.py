"""Hashing: a whole file, and pieces in order by a thread beside other work.

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
"""How many pieces the thread may be behind. A caller that gives it buffers may use a buffer again
once it has given so many others."""

_Piece = tuple["bytes | memoryview", "tuple[Hasher, ...]"]


def hash_file(file: FileIO, hasher: Hasher) -> int:
    """Give the hasher the rest of the file; returns how many bytes that is."""
    size = 0
    buffer = read_buffer(READ_SIZE)
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
        size += count
    return size


class Hashing:
    """A thread that hashes what its owner gives it. All methods belong to the owner's thread."""

    def __init__(self, name: str, *, behind: int = BEHIND) -> None:
        """Raises RuntimeError where the system gives no thread."""
        # The thread works on one more.
        self._pieces: Queue[_Piece | None] = Queue(behind - 1)
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def update(self, data: bytes | memoryview, *hashers: Hasher) -> None:
        """Waits while the thread is too far behind."""
        self._pieces.put((data, hashers))

    def wait(self) -> None:
        """Until everything given so far is hashed."""
        self._pieces.join()

    def close(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            data, hashers = piece
            for hasher in hashers:
                hasher.update(data)
            self._pieces.task_done()
