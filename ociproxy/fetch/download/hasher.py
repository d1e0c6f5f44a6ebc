"""The digest of a file whose bytes arrive in any order."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy.oci.digest import Digest
from ociproxy.store.files import store_errors
from ociproxy.store.hashing import Hashing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.store.ingest import Ingest

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
        self._algorithm = digest.algorithm
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
        """These bytes are in the file. Waits while hashing is too far behind. Raises StoreError."""
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
        return Digest.finish(self._hasher, self._algorithm)

    def stop(self) -> None:
        """Returns when the thread, if there is one, has ended."""
        if self._hashing is not None:
            self._hashing.close()

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
