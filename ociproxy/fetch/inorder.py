"""The digest of a file whose bytes arrive in any order."""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING

from ociproxy.digest import Digest
from ociproxy.store.files import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable


class InOrderHasher:
    """Hashes what comes next as it comes, and reads the rest from the file later; thread-safe."""

    def __init__(self, algorithm_of: Digest) -> None:
        self._algorithm = algorithm_of.algorithm
        self._hasher = algorithm_of.hasher()
        self._lock = Lock()
        self.position = 0

    def put(self, offset: int, data: bytes) -> None:
        """Bytes that arrived at offset: hashed now if they are next, else left to `catch_up`."""
        with self._lock:
            if offset == self.position:
                self._hasher.update(data)
                self.position += len(data)

    def catch_up(self, file: int, arrived_until: Callable[[int], int]) -> None:
        """Hash from the file what has arrived, as far as it is contiguous."""
        with self._lock:
            stop = arrived_until(self.position)
            while self.position < stop:
                data = os.pread(file, min(READ_SIZE, stop - self.position), self.position)
                if not data:
                    return
                self._hasher.update(data)
                self.position += len(data)

    def digest(self) -> Digest:
        return Digest.finish(self._hasher, self._algorithm)
