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

    from ociproxy.store.staging import Ingest

_BEHIND: Final = 3
"""Pieces that may wait to be hashed in memory, of as many bytes as a connection brings at once."""
_PIECE: Final = 256 * 1024
"""Bytes at least: TLS brings 16 KiB at once, which are hashed sooner than another thread wakes."""
_READ_SIZE: Final = 1024 * 1024
_CATCH_UP: Final = 4
"""Bytes that whoever brings one reads and hashes beside: with what arrived before, or came out of
order, it is caught up by and by, and no connection is idle for long."""


class InOrderHasher:
    """Hashes what arrives, in order: from memory what comes in order, from the file what does not.

    `start` lets a thread of its own do it beside the connections, for hashing takes about as long
    as a fast upstream. `stop` when nothing arrives any more.
    """

    def __init__(self, digest: Digest, ingest: Ingest, arrived_until: Callable[[int], int]) -> None:
        self.position = 0
        self._algorithm = digest.algorithm
        self._hasher = digest.hasher()
        self._ingest = ingest
        self._arrived_until = arrived_until
        self._lock = Lock()
        self._hashing: Hashing | None = None
        self._waiting: list[bytes] = []
        self._waiting_size = 0

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
                self._catch_up(_CATCH_UP * len(data))
            finally:
                self._lock.release()

    def digest(self) -> Digest:
        """Of the bytes up to `position`, which is where the first gap is. Raises StoreError."""
        with self._lock:
            while self._catch_up(_READ_SIZE):
                pass
            self._give()
            if self._hashing is not None:
                self._hashing.wait()
        return Digest.finish(self._hasher, self._algorithm)

    def stop(self) -> None:
        """Returns when the thread, if there is one, has ended."""
        if self._hashing is not None:
            self._hashing.close()

    def _hash(self, data: bytes) -> None:
        self.position += len(data)
        self._waiting.append(data)
        self._waiting_size += len(data)
        if self._waiting_size >= _PIECE:
            self._give()

    def _give(self) -> None:
        data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting, self._waiting_size = [], 0
        if self._hashing is None:
            self._hasher.update(data)
        else:
            self._hashing.update(data, self._hasher)

    def _catch_up(self, most: int) -> bool:
        """With so many bytes of the file; whether there may be more."""
        limit = self.position + most
        with store_errors(self._ingest.path):
            while (stop := min(self._arrived_until(self.position), limit)) > self.position:
                size = min(stop - self.position, _READ_SIZE)
                data = os.pread(self._ingest.file, size, self.position)
                if not data:
                    return False
                self._hash(data)
        return self.position == limit
