"""One blob on its way into the store: who fetches it, what has arrived, whether it is right.

A backend brings the bytes, in a thread of the download's own. The process that holds the lock on
the file in `pulls/` is the leader: it writes and hashes. Other processes follow: they read the
leader's file and journal. `Fill` is the same download as the readers in the event loop see it.

Tests: tests/fetch/download/test_fill.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import logging
import os
import time
from enum import IntEnum
from threading import Event, Lock
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    DigestMismatch,
    IntegrityError,
    OciProxyError,
    SizeMismatch,
    StoreError,
    UpstreamUnavailable,
)
from ociproxy.fetch.download.hasher import InOrderHasher
from ociproxy.fetch.download.segments import Segment, Segments
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.config.settings import Fetch
    from ociproxy.fetch.backend import Backend
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.staging import Ingest
    from ociproxy.store.store import Store

_FOLLOW_INTERVAL: Final = 0.02
"""Seconds between a follower's looks at the leader's journal."""
_WORTH_A_THREAD: Final = 1024 * 1024
"""Bytes from which a blob is hashed by a thread of its own. A connection's thread hashes a smaller
one sooner than another thread wakes up."""


class State(IntEnum):
    """How far a download is. It only moves forward."""

    STARTING = 0
    """The size is not known; readers wait for it."""
    ARRIVING = 1
    """The size is known; readers may read what has arrived."""
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

    def help_at(self, offset: int) -> None:
        """A reader waits for the byte at this offset; any thread."""


class Download:
    """Any thread may read the public attributes. `_lock` guards the ingest and the segments; no
    other object takes it."""

    def __init__(
        self,
        repository: Repository,
        digest: Digest,
        store: Store,
        limits: Fetch,
        *,
        partition: str,
        expected_size: int | None,
        notify: Callable[[], None],
        spawn: Callable[[Callable[[], None]], Future[None]],
    ) -> None:
        """`partition` is who may share the bytes before they are verified (`Config.partition`).
        `notify` tells the readers of news. `spawn` runs one more connection in a thread."""
        self.digest = digest
        self.size = expected_size
        self.state = State.STARTING
        self.limits = limits
        self.spawn = spawn
        self.stopped = Event()
        self.bytes_fetched = 0
        """Bytes that the upstream has sent for this download, those it sent twice included."""
        self.bytes_resumed = 0
        self._repository = repository
        self._partition = partition
        self._store = store
        self._notify = notify
        self._lock = Lock()
        self._segments = Segments(limits.segment)
        self._ingest: Ingest | None = None
        self._hasher: InOrderHasher | None = None
        self._fetcher: Fetcher | None = None

    # For readers

    def available(self, offset: int) -> int:
        """The end of the bytes that can be read from offset. The last byte waits for the
        verification, so that no reader ever has all of a wrong blob."""
        with self._lock:
            if self.size is None:
                return offset
            if self.state is State.VERIFIED:
                return self.size
            if self._ingest is None:
                return offset
            return max(offset, min(self._ingest.ranges.stop_after(offset), self.size - 1))

    def want(self, offset: int) -> None:
        """A reader waits for the byte at offset: it is fetched first."""
        with self._lock:
            self._segments.want(offset)
            fetcher = self._fetcher
        if fetcher is not None:
            fetcher.help_at(offset)

    def unwant(self, offset: int) -> None:
        with self._lock:
            self._segments.unwant(offset)

    def duplicate_file(self) -> int:
        """A file descriptor of the bytes that are `available`; the caller closes it."""
        with self._lock:
            if self._ingest is not None:
                return os.dup(self._ingest.file)
        path = self._store.blobs.path(self.digest)
        with store_errors(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    # For the owner

    def run(self, backend: Backend) -> None:
        """Return when the blob is in the store. Called once. Raises what ended the download."""
        backend.fetch_blob(self._repository, self.digest, self, tries=self.limits.retries)
        if self.state is not State.VERIFIED and not self._take_committed():
            raise self.unavailable("the blob has gone from the store again")

    def abort(self) -> None:
        """Stop soon; what has arrived stays in `pulls/`."""
        self.stopped.set()
        fetcher = self._fetcher
        if fetcher is not None:
            fetcher.abort()

    def close(self) -> None:
        """No more bytes will come from this file. Readers keep the descriptors that they
        duplicated."""
        with self._lock:
            ingest, self._ingest = self._ingest, None
        if ingest is not None:
            ingest.close()

    # For backends

    def learn_size(self, size: int) -> None:
        """The upstream says how many bytes the blob has. Raises BlobTooLarge or SizeMismatch."""
        self.check_limit(size)
        with self._lock:
            if self.size not in (None, size):
                raise SizeMismatch(f"blob {self.digest}", self.size, size)
            self._set_size(size)
        self._notify()

    def check_limit(self, size: int) -> None:
        """Raises BlobTooLarge for a blob of at least this many bytes."""
        if size > self.limits.blob_limit:
            raise BlobTooLarge(self._repository.registry, self.digest, self.limits.blob_limit)

    def lead(self, fetcher: Fetcher) -> None:
        """Fetch the blob, or follow the process that does; return when it is in the store.

        A second call goes on with what the first one brought. Raises what `fetcher` raises,
        IntegrityError kinds, StoreError or UpstreamUnavailable.
        """
        while True:
            ingest = self._ingest
            if ingest is None or not ingest.leading:
                ingest = self._store.staging.lead(self.digest, self._partition)
            if self._follow() if ingest is None else self._fetch(ingest, fetcher):
                return

    def take_segment(self, most: int) -> Segment | None:
        """The next bytes to fetch, at most `most` of them where that is more than a segment. None
        where all bytes are here or another connection fetches them."""
        with self._lock:
            return self._segments.take(self._led().ranges, self.size, most)

    def move_segment(self, segment: Segment, offset: int, stop: int) -> bool:
        """Let a used-up segment go on within [offset, stop); False where nothing is left there."""
        with self._lock:
            return self._segments.move(segment, self._led().ranges, offset, stop)

    def release(self, segment: Segment) -> None:
        """The connection ends; others may fetch what the segment still covers."""
        with self._lock:
            self._segments.release(segment)

    def needs_help_at(self, offset: int) -> bool:
        """Whether no connection is on its way to this byte."""
        with self._lock:
            if self.size is None or self._ingest is None:
                return False
            return not self._segments.is_coming(self._ingest.ranges, offset)

    @property
    def is_all_taken(self) -> bool:
        """Whether every byte is here or being fetched."""
        with self._lock:
            if self._ingest is None:
                return True
            return self._segments.free_gap(self._ingest.ranges, self.size) is None

    @property
    def bytes_left(self) -> int:
        with self._lock:
            return (self.size or 0) - self._led().ranges.total

    def put(self, segment: Segment, data: bytes) -> None:
        """Write the next bytes of a segment. Waits while hashing is too far behind. Raises
        StoreError or BlobTooLarge."""
        start, stop = segment.start, segment.start + len(data)
        self.check_limit(stop)
        ingest = self._led()
        ingest.write(start, data)
        with self._lock:
            segment.start = stop
            ingest.arrived(start, stop, flush=stop == segment.stop)
        self._notify()
        if self._hasher is not None:
            self._hasher.take(start, data)

    def wait(self, seconds: float) -> None:
        """Between two tries: shorter where the download is stopped."""
        self.stopped.wait(seconds)

    def unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(self._repository.registry, reason)

    # Leading and following

    def _follow(self) -> bool:
        """Another process leads: read along until it is done (True) or gone (False)."""
        ingest = self._store.staging.follow(self.digest, self._partition)
        if ingest is None:
            return self._store.blobs.find_size(self.digest) is not None
        self._adopt(ingest)
        while not self.stopped.wait(_FOLLOW_INTERVAL):
            led = ingest.is_led()
            committed = self._store.blobs.find_size(self.digest)
            with self._lock:
                ingest.refresh()
                self.size = ingest.size if committed is None else committed
                if self.size is not None:
                    self._reach(State.ARRIVING)
            # A reader of this file cannot go on in another one: wait until the leader is done.
            if committed is not None and (
                not led or not ingest.ranges.total or ingest.is_committed(self._store.blobs)
            ):
                return self._take_committed()
            self._notify()
            if not led:
                return False
        raise self.unavailable("shutting down")

    def _fetch(self, ingest: Ingest, fetcher: Fetcher) -> bool:
        """This process leads. False where it has to look for a leader anew."""
        if ingest is not self._ingest and not self._begin(ingest):
            return self._take_committed()
        began = time.monotonic()
        hasher = InOrderHasher(self.digest, ingest, self._arrived_until)
        with self._lock:
            self._hasher, self._fetcher = hasher, fetcher
        try:
            self.check_limit(self.size or 0)
            self._start_hasher()
            fetcher.run()
            self._reach(State.WHOLE)
            self._notify()
            self._verify(hasher)
        except (IntegrityError, StoreError, BlobTooLarge):
            ingest.discard()
            raise
        except OciProxyError:
            if ingest.ranges.total == 0:
                ingest.discard()
                self.close()
            raise
        finally:
            with self._lock:
                self._fetcher = None
            hasher.stop()
        self._reach(State.VERIFIED)
        self._notify()
        ingest.commit(self._store.blobs)
        log.event(
            logging.INFO,
            "filled",
            digest=self.digest,
            upstream=self._repository.registry,
            bytes=self.size,
            resumed=self.bytes_resumed or None,
            seconds=time.monotonic() - began,
        )
        return True

    def _begin(self, ingest: Ingest) -> bool:
        """Take over what arrived before; False where the file is of no use."""
        stored = self._store.blobs.find_size(self.digest) is not None
        if stored or (self.size is not None and ingest.size not in (None, self.size)):
            # Another process committed the blob between our look and our lock; or the file holds
            # bytes of another size. It is removed and not emptied: followers read it.
            ingest.discard()
            ingest.close()
            return False
        self._adopt(ingest)
        self.size = self.size if ingest.size is None else ingest.size
        if self.size is not None:
            ingest.set_size(self.size)
        self.bytes_resumed = ingest.ranges.total
        return True

    def _take_committed(self) -> bool:
        """The blob is in the store: readers go on there. False where it is not."""
        path = self._store.blobs.path(self.digest)
        size = self._store.blobs.find_size(self.digest)
        if size is None:
            return False
        self._adopt(self._store.staging.open_committed(path, self.digest))
        self.size = size
        self._reach(State.VERIFIED)
        self._notify()
        return True

    def _adopt(self, ingest: Ingest) -> None:
        """Readers read this file from now on. Raises UpstreamUnavailable where they have read from
        another one, for its bytes were promised to them."""
        with self._lock:
            old = self._ingest
            if old is not None and old.ranges.total and not old.is_same_file(ingest):
                ingest.close()
                raise self.unavailable("the process that fetched it gave up")
            self._ingest = ingest
        if old is not None:
            old.close()

    def _set_size(self, size: int) -> None:
        """With the lock held."""
        self.size = size
        self._reach(State.ARRIVING)
        if self._ingest is not None and self._ingest.leading:
            self._ingest.set_size(size)
        self._start_hasher()

    def _start_hasher(self) -> None:
        if self._hasher is not None and (self.size or 0) > _WORTH_A_THREAD:
            self._hasher.start()

    def _verify(self, hasher: InOrderHasher) -> None:
        actual = hasher.digest()
        if hasher.position != self.size:
            raise SizeMismatch(f"blob {self.digest}", self.size, hasher.position)
        if actual != self.digest:
            raise DigestMismatch("blob", self.digest, actual)

    def _reach(self, state: State) -> None:
        self.state = max(self.state, state)

    def _arrived_until(self, offset: int) -> int:
        with self._lock:
            return self._led().ranges.stop_after(offset)

    def _led(self) -> Ingest:
        if self._ingest is None:
            raise self.unavailable("the download has ended")
        return self._ingest
