"""Hashing beside other work: of pieces in order by a thread beside the caller's work, and of an
arriving blob whose bytes come in any order.

Tests: tests/store/test_hashing.py, tests/store/test_writer.py."""

from __future__ import annotations

import os
from contextlib import suppress
from queue import Queue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestMismatch
from ociproxy.oci.digest import Digest
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.oci.digest import Hasher
    from ociproxy.store.ingest import Ingest


BEHIND: Final = 7
"""Pieces that the thread may be behind its caller. A caller may fill a buffer again once it has
given this many others."""

_Piece = tuple["bytes | memoryview", "tuple[Hasher, ...]"]


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


_BEHIND: Final = 3
"""Pieces that may wait in memory to be hashed, each of as many bytes as one read brings."""
_READ_SIZE: Final = 1024 * 1024
_CATCH_UP: Final = 4
"""For each new byte, also hash up to 4 bytes of backlog from disk, so that resumed data catches up
without idling a connection."""


class InOrderHasher:
    """Hashes in order: from memory the bytes that arrive in order, from the file all others.

    `start` gives it a thread of its own, for hashing takes about as long as a fast upstream. `stop`
    it when nothing arrives any more.
    """

    def __init__(self, digest: Digest, ingest: Ingest, arrived_until: Callable[[int], int]) -> None:
        """`arrived_until` tells the end of the bytes that are in the file from an offset on."""
        self.position = 0
        """Where the next byte to hash is; no byte before it is missing."""
        self._expected = digest
        self._hasher = digest.hasher()
        self._ingest = ingest
        self._arrived_until = arrived_until
        self._lock = Lock()
        self._hashing: Hashing | None = None

    def start(self) -> None:
        """A second call changes nothing."""
        if self._hashing is None:
            with suppress(RuntimeError):  # without a thread the connections' threads hash
                self._hashing = Hashing("fill-hash", behind=_BEHIND)

    def take(self, start: int, data: bytes) -> None:
        """These bytes are in the file. Waits while hashing is too far behind, but returns at once
        where another thread is in here. Raises StoreError."""
        # While another connection's thread hashes, leave them: they are read from the file later.
        if self._lock.acquire(blocking=False):
            try:
                if start == self.position:
                    self._hash(data)
                self._catch_up(_CATCH_UP * len(data))
            finally:
                self._lock.release()

    def digest(self) -> Digest:
        """Of the bytes up to `position`, which is where the first gap is. Raises StoreError."""
        with self._lock:
            while self._catch_up(_READ_SIZE):
                pass
            if self._hashing is not None:
                self._hashing.wait()
        return Digest.finish(self._hasher, self._expected.algorithm)

    def is_whole(self, offset: int, *, new: bool) -> bool:
        """Whether the blob ends at offset, where a body has ended. Raises StoreError. Raises
        DigestMismatch where other bytes are here, up to there, and this body brought nothing
        `new`: neither will the next one."""
        actual = self.digest()
        if self.position == offset and actual == self._expected:
            return True
        if self.position == offset > 0 and not new:
            raise DigestMismatch("blob", self._expected, actual)
        return False

    def stop(self) -> None:
        """Returns when the thread, if there is one, has ended. A later `start` goes on from
        `position`."""
        if self._hashing is not None:
            self._hashing.close()
            self._hashing = None

    def is_of(self, ingest: Ingest) -> bool:
        """Whether it hashes this file."""
        return self._ingest is ingest

    def _hash(self, data: bytes) -> None:
        self.position += len(data)
        if self._hashing is None:
            self._hasher.update(data)
        else:
            self._hashing.update(data, self._hasher)

    def _catch_up(self, most: int) -> bool:
        """Hash at most so many bytes of the file; True where there may be more."""
        limit = self.position + most
        with store_errors(self._ingest.path):
            while (stop := min(self._arrived_until(self.position), limit)) > self.position:
                size = min(stop - self.position, _READ_SIZE)
                data = os.pread(self._ingest.file, size, self.position)
                if not data:
                    return False
                self._hash(data)
        return self.position == limit
