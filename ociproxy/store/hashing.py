"""Hashing beside other work: a thread that hashes what it is given, in order."""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ociproxy.digest import Hasher

BEHIND: Final = 7
"""How many pieces a thread may be behind: whoever gives it buffers uses one of them again when it
has given so many others."""

_Piece = tuple["bytes | memoryview", "tuple[Hasher, ...]"]


class Hashing:
    """Belongs to one thread, which gives and waits; `close` ends the other one."""

    def __init__(self, name: str) -> None:
        # One more is in the thread's hands.
        self._pieces: Queue[_Piece | None] = Queue(BEHIND - 1)
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
