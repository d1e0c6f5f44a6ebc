"""The digest of a file whose bytes arrive in any order."""

from __future__ import annotations

import os
from threading import Event, Lock
from typing import TYPE_CHECKING, Final

from ociproxy.digest import Digest
from ociproxy.errors import StoreError
from ociproxy.store.files import read_buffer, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.store.staging import Arrival

_READ_SIZE: Final = 512 * 1024
"""Bytes; each running fill has a buffer of this size."""


class InOrderHasher:
    """Hashes what has arrived, from the file and in order, behind those who write it.

    `follow` lets a thread of its own do it as the bytes come, for hashing takes about as long as a
    fast upstream; without one `digest` does it all. `stop` before the file is closed: nothing is
    hashed after it.
    """

    def __init__(
        self, digest: Digest, arrival: Arrival, arrived_until: Callable[[int], int]
    ) -> None:
        self.position = 0
        self._algorithm = digest.algorithm
        self._hasher = digest.hasher()
        self._arrival = arrival
        self._arrived_until = arrived_until
        self._buffer = read_buffer(_READ_SIZE)
        self._lock = Lock()
        self._news = Event()
        self._stopping = False
        self._following: Future[None] | None = None

    def follow(self, spawn: Callable[[Callable[[], None]], Future[None]]) -> None:
        """From now on keep up with what arrives; more than one call changes nothing."""
        if self._following is None:
            try:
                self._following = spawn(self._follow)
            except RuntimeError:
                return  # the pool has been closed, and whoever fetches will see it soon

    def more(self) -> None:
        """Something has arrived."""
        self._news.set()

    def stop(self) -> None:
        """Returns when the thread, if there is one, has ended."""
        self._stopping = True
        self._news.set()
        if self._following is not None and not self._following.cancel():
            self._following.result()

    def digest(self) -> Digest:
        """Of the bytes up to `position`, which is where the first gap is. Raises StoreError."""
        self._catch_up()
        return Digest.finish(self._hasher, self._algorithm)

    def _follow(self) -> None:
        try:
            while not self._stopping:
                self._news.wait()
                self._news.clear()
                self._catch_up()
        except StoreError:
            return  # `digest` runs into the same, where it can be reported

    def _catch_up(self) -> None:
        with self._lock, store_errors(self._arrival.path):
            buffer = self._buffer
            while not self._stopping:
                stop = self._arrived_until(self.position)
                want = buffer[: min(_READ_SIZE, stop - self.position)]
                count = os.preadv(self._arrival.file, [want], self.position) if want else 0
                if not count:
                    return
                self._hasher.update(buffer[:count])
                self.position += count
