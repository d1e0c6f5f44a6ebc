"""The digest of a file whose bytes arrive in any order."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy.digest import Digest
from ociproxy.store.files import store_errors
from ociproxy.store.hashing import Hashing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.store.staging import Arrival

_BEHIND: Final = 3
"""Pieces that may wait to be hashed in memory, of as many bytes as a connection brings at once."""
_READ_SIZE: Final = 1024 * 1024
_CATCH_UP: Final = 4 * 1024 * 1024
"""Bytes that whoever brings some hashes beside: what arrived before, or came out of order, is
caught up with by and by, and the connection is not idle for long."""


class InOrderHasher:
    """Hashes what arrives, in order: from memory what comes in order, from the file what does not.

    `start` lets a thread of its own do it beside the connections, for hashing takes about as long
    as a fast upstream. `stop` when nothing arrives any more.
    """

    def __init__(
        self, digest: Digest, arrival: Arrival, arrived_until: Callable[[int], int]
    ) -> None:
        self.position = 0
        self._algorithm = digest.algorithm
        self._hasher = digest.hasher()
        self._arrival = arrival
        self._arrived_until = arrived_until
        self._lock = Lock()
        self._hashing: Hashing | None = None

    def start(self) -> None:
        """More than one call changes nothing."""
        if self._hashing is None:
            with suppress(RuntimeError):  # without a thread whoever brings bytes hashes them
                self._hashing = Hashing("fill-hash", behind=_BEHIND)

    def take(self, start: int, data: bytes) -> None:
        """These bytes are in the file. Waits while hashing is too far behind. Raises StoreError."""
        # Whoever hashes now finds them in the file, or who comes next does.
        if self._lock.acquire(blocking=False):
            try:
                if start == self.position:
                    self._hash(data)
                self._catch_up(_CATCH_UP)
            finally:
                self._lock.release()

    def digest(self) -> Digest:
        """Of the bytes up to `position`, which is where the first gap is. Raises StoreError."""
        with self._lock:
            while self._catch_up(_CATCH_UP):
                pass
            if self._hashing is not None:
                self._hashing.wait()
        return Digest.finish(self._hasher, self._algorithm)

    def stop(self) -> None:
        """Returns when the thread, if there is one, has ended."""
        if self._hashing is not None:
            self._hashing.close()

    def _hash(self, data: bytes) -> None:
        if self._hashing is None:
            self._hasher.update(data)
        else:
            self._hashing.update(data, self._hasher)
        self.position += len(data)

    def _catch_up(self, most: int) -> bool:
        """With so many bytes of the file; whether there may be more."""
        limit = self.position + most
        with store_errors(self._arrival.path):
            while (stop := min(self._arrived_until(self.position), limit)) > self.position:
                size = min(stop - self.position, _READ_SIZE)
                data = os.pread(self._arrival.file, size, self.position)
                if not data:
                    return False
                self._hash(data)
        return self.position == limit
