"""The thread side of a fill: one blob from an upstream into `pulls/`, verified, then committed.

One process leads and fetches (`fetch.download.connections`); others follow it on the disk. What is
there is hashed in order as it comes, and published only when that was right.
"""

from __future__ import annotations

import logging
import os
import time
from threading import Event, Lock
from typing import TYPE_CHECKING, Final

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
from ociproxy.fetch.download.connections import BlobOrigin, Delivered, Transfer
from ociproxy.fetch.download.hasher import InOrderHasher
from ociproxy.fetch.download.segments import Segments
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.config.settings import Fetch
    from ociproxy.oci.digest import Digest
    from ociproxy.store.staging import Ingest
    from ociproxy.store.store import Store

_FOLLOW_INTERVAL: Final = 0.02
"""Seconds between looks at what another process has fetched."""
_WORTH_A_THREAD: Final = 1024 * 1024
"""Bytes above which a blob is hashed beside the connection, and not by it."""


class Download:
    """Public attributes may be read from any thread; `run` is called once, in a thread of its
    own."""

    def __init__(
        self,
        digest: Digest,
        source: BlobOrigin,
        store: Store,
        limits: Fetch,
        *,
        expected_size: int | None,
        notify: Callable[[], None],
        spawn: Callable[[Callable[[], None]], Future[None]],
    ) -> None:
        self.digest = digest
        self.size = expected_size
        self.started = False
        self.whole = False
        """All of it is there, verified or not: what is left is soon over."""
        self.verified = False
        self.bytes_resumed = 0
        self._origin = source
        self._store = store
        self._limits = limits
        self._notify = notify
        self._spawn = spawn
        self._lock = Lock()
        self._stopped = Event()
        self._segments = Segments(limits.segment)
        self._ingest: Ingest | None = None
        self._hasher: InOrderHasher | None = None
        self._transfer: Transfer | None = None

    @property
    def bytes_fetched(self) -> int:
        """Bytes that the upstream has sent for it."""
        return 0 if self._transfer is None else self._transfer.bytes_fetched

    def available(self, offset: int) -> int:
        """The end of the bytes that can be read from offset. The last byte waits for
        verification, so that a reader of the whole never gets the whole of something wrong."""
        with self._lock:
            if self.size is None:
                return offset
            if self.verified:
                return self.size
            if self._ingest is None:
                return offset
            return max(offset, min(self._ingest.ranges.stop_after(offset), self.size - 1))

    def want(self, offset: int) -> None:
        """A reader waits for the byte at offset: fetch it first."""
        with self._lock:
            self._segments.want(offset)
            transfer = self._transfer
        if transfer is not None:
            transfer.help_at(offset)

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

    def abort(self) -> None:
        """Stop soon; what has arrived stays in `pulls/`."""
        self._stopped.set()
        if self._transfer is not None:
            self._transfer.abort()

    def run(self) -> None:
        """Raises what ended the download. Returns when the blob is in the store."""
        while True:
            ingest = self._store.staging.lead(self.digest, self._origin.partition)
            if self._follow() if ingest is None else self._lead(ingest):
                return

    def close(self) -> None:
        """After `run`: readers keep the descriptors they duplicated."""
        with self._lock:
            ingest, self._ingest = self._ingest, None
        if ingest is not None:
            ingest.close()

    def _follow(self) -> bool:
        """Another process leads: read along until it is done (True) or gone (False)."""
        ingest = self._store.staging.follow(self.digest, self._origin.partition)
        if ingest is None:
            return self._store.blobs.find_size(self.digest) is not None
        self._adopt(ingest)
        while not self._stopped.wait(_FOLLOW_INTERVAL):
            led = ingest.is_led()
            committed = self._store.blobs.find_size(self.digest)
            with self._lock:
                ingest.refresh()
                self.size = ingest.size if committed is None else committed
                self.started = self.size is not None
            # Another one than is being followed is of no use to those who have read from this one.
            if committed is not None and (
                not led or not ingest.ranges.total or ingest.is_committed(self._store.blobs)
            ):
                return self._take_committed()
            self._notify()
            if not led:
                return False
        raise self._unavailable("shutting down")

    def _lead(self, ingest: Ingest) -> bool:
        """Fetch it, True; or find that what arrived before belongs to something else, False."""
        if self._store.blobs.find_size(self.digest) is not None:
            # Another process was done between our look and our lock.
            ingest.discard()
            ingest.close()
            return self._take_committed()
        if self.size is not None and ingest.size not in (None, self.size):
            # Not emptied: whoever follows this file was promised its bytes.
            ingest.discard()
            ingest.close()
            return False
        self._adopt(ingest)
        self.size = self.size if ingest.size is None else ingest.size
        if self.size is not None:
            ingest.set_size(self.size)
        self.bytes_resumed = ingest.ranges.total
        began = time.monotonic()
        delivered = False
        hasher = self._hasher = InOrderHasher(self.digest, ingest, self._arrived_until)
        try:
            self._fetch(ingest, hasher)
            self.whole = True
            self._notify()
            self._verify(hasher)
        except Delivered:
            delivered = True
        except (IntegrityError, StoreError, BlobTooLarge):
            ingest.discard()
            raise
        except OciProxyError:
            if ingest.ranges.total == 0:
                ingest.discard()
            raise
        finally:
            hasher.stop()
        if delivered:
            ingest.discard()
            return self._take_committed()
        self.started = self.verified = True
        self._notify()
        ingest.commit(self._store.blobs)
        seconds = time.monotonic() - began
        log.event(
            logging.INFO,
            "filled",
            digest=self.digest,
            upstream=self._origin.upstream,
            bytes=self.size,
            resumed=self.bytes_resumed or None,
            seconds=seconds,
        )
        return True

    def _take_committed(self) -> bool:
        """The blob is in the store: readers go on there. False where it has gone again."""
        path = self._store.blobs.path(self.digest)
        size = self._store.blobs.find_size(self.digest)
        if size is None:
            return False
        self._adopt(self._store.staging.open_committed(path, self.digest))
        self.size = size
        self.started = self.whole = self.verified = True
        self._notify()
        return True

    def _adopt(self, ingest: Ingest) -> None:
        """Readers see this ingest from now on; those that have read from another file were
        promised its bytes."""
        with self._lock:
            old = self._ingest
            if old is not None and old.ranges.total and not old.is_same_file(ingest):
                ingest.close()
                raise UpstreamUnavailable(
                    self._origin.upstream, "the process that fetched it gave up"
                )
            self._ingest = ingest
        if old is not None:
            old.close()

    def _fetch(self, ingest: Ingest, hasher: InOrderHasher) -> None:
        transfer = Transfer(
            ingest,
            self._origin,
            self._limits,
            size=self.size,
            plan=self._segments,
            lock=self._lock,
            stopped=self._stopped,
            spawn=self._spawn,
            learned=self._learned,
            progressed=self._notify,
            arrived=hasher.take,
        )
        with self._lock:
            self._transfer = transfer
        transfer.run()

    def _learned(self, size: int) -> None:
        self.size, self.started = size, True
        if self._hasher is not None and size > _WORTH_A_THREAD:
            self._hasher.start()

    def _verify(self, hasher: InOrderHasher) -> None:
        actual = hasher.digest()
        if hasher.position != self.size:
            raise SizeMismatch(f"blob {self.digest}", self.size, hasher.position)
        if actual != self.digest:
            raise DigestMismatch("blob", self.digest, actual)

    def _arrived_until(self, offset: int) -> int:
        with self._lock:
            return self._staged().ranges.stop_after(offset)

    def _staged(self) -> Ingest:
        if self._ingest is None:
            raise self._unavailable("the download has ended")
        return self._ingest

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(self._origin.upstream, reason)
