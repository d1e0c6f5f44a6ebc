"""The thread side of a fill: one blob from an upstream into `pulls/`, verified, then committed.

A blob of up to one segment is one request. A larger one is fetched segment by segment over one
connection, and over several as soon as one proves slow, or a reader waits for bytes that nobody is
fetching. What broke is asked for again from where it stopped. Everything is hashed in order, and
only then published.
"""

from __future__ import annotations

import logging
import os
import time
from threading import Event, Lock
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    DigestMismatch,
    IntegrityError,
    OciProxyError,
    SizeMismatch,
    StoreError,
    UpstreamUnavailable,
)
from ociproxy.fetch.helpers import Helpers
from ociproxy.fetch.inorder import InOrderHasher
from ociproxy.fetch.plan import UNKNOWN, Claim, Plan
from ociproxy.fetch.upstream import retrying
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.config.settings import Fetch
    from ociproxy.digest import Digest
    from ociproxy.fetch.upstream import BlobStream, OpenBlob
    from ociproxy.store.staging import Arrival
    from ociproxy.store.store import Store

_CHUNK: Final = 256 * 1024
"""Bytes asked from a connection at a time."""
_PROGRESS: Final = 256 * 1024
"""Bytes a broken connection must have brought for the next one not to count as another try."""
_PATIENCE: Final = 0.5
"""Seconds one connection may show how fast it is before others help."""
_WORTH_HELP: Final = 1.0
"""Seconds of work that must be left for help to be worth its connections."""
_FOLLOW_INTERVAL: Final = 0.02
"""Seconds between looks at what another process has fetched."""


class Download:
    """Public attributes may be read from any thread; `run` is called once, in a thread of its
    own."""

    def __init__(
        self,
        digest: Digest,
        *,
        upstream: str,
        circle: str,
        open_blob: OpenBlob,
        store: Store,
        limits: Fetch,
        connections: int,
        expected_size: int | None,
        notify: Callable[[], None],
        spawn: Callable[[Callable[[], None]], Future[None]],
    ) -> None:
        self.digest = digest
        self.size = expected_size
        self.started = False
        self.verified = False
        self.bytes_fetched = 0
        self._upstream, self._circle = upstream, circle
        self._open_blob = open_blob
        self._store = store
        self._limits = limits
        self._notify = notify
        self._arrival: Arrival | None = None
        self._lock = Lock()
        self._helpers = Helpers(self._lock, connections - 1, spawn)
        self._stopped = Event()
        self._plan = Plan(limits.segment)
        self._streams: set[BlobStream] = set()
        self._ranges = True
        self._hasher = InOrderHasher(digest)
        self._began = time.monotonic()

    def available(self, offset: int) -> int:
        """The end of the bytes that can be read from offset. The last byte waits for
        verification, so that a reader of the whole never gets the whole of something wrong."""
        with self._lock:
            if self.size is None:
                return offset
            if self.verified:
                return self.size
            if self._arrival is None:
                return offset
            return max(offset, min(self._arrival.spans.stop_after(offset), self.size - 1))

    def want(self, offset: int) -> None:
        """A reader waits for the byte at offset: fetch it first."""
        with self._lock:
            self._plan.want(offset)
            help_now = (
                self.started
                and self._arrival is not None
                and not self._plan.is_coming(self._arrival.spans, offset)
            ) and self._take_helper()
        if help_now:
            self._helpers.call(self._help)

    def unwant(self, offset: int) -> None:
        with self._lock:
            self._plan.unwant(offset)

    def duplicate_file(self) -> int:
        """A file descriptor of the arriving bytes; the caller closes it."""
        with self._lock:
            return os.dup(self._staged().file)

    def abort(self) -> None:
        """Stop soon; what has arrived stays in `pulls/`."""
        self._stopped.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def run(self) -> None:
        """Raises what ended the download. Returns when the blob is in the store."""
        while True:
            arrival = self._store.staging.lead(self.digest, self._circle)
            if self._follow() if arrival is None else self._lead(arrival):
                return

    def close(self) -> None:
        """After `run`: readers keep the descriptors they duplicated."""
        with self._lock:
            arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.close()

    def _follow(self) -> bool:
        """Another process leads: read along until it is done (True) or gone (False)."""
        arrival = self._store.staging.follow(self.digest, self._circle)
        if arrival is None:
            return self._store.blobs.find_size(self.digest) is not None
        self._adopt(arrival)
        while not self._stopped.wait(_FOLLOW_INTERVAL):
            led = arrival.is_led()
            committed = self._store.blobs.find_size(self.digest)
            with self._lock:
                arrival.refresh()
                self.size = arrival.size if committed is None else committed
                self.started = self.size is not None
                self.verified = committed is not None
            self._notify()
            if committed is not None:
                return True
            if not led:
                return False
        raise UpstreamUnavailable(self._upstream, "shutting down")

    def _lead(self, arrival: Arrival) -> bool:
        """Fetch it, True; or find that what arrived before belongs to something else, False."""
        committed = self._store.blobs.find_size(self.digest)
        if committed is not None:
            # Another process was done between our look and our lock.
            arrival.discard()
            arrival.close()
            blob = self._store.blobs.path(self.digest)
            self._adopt(self._store.staging.open_committed(blob, self.digest))
            self.size, self.started, self.verified = committed, True, True
            return True
        if self.size is not None and arrival.size not in (None, self.size):
            # Not emptied: whoever follows this file was promised its bytes.
            arrival.discard()
            arrival.close()
            return False
        self._adopt(arrival)
        self.size = self.size if arrival.size is None else arrival.size
        resumed = arrival.spans.total
        try:
            self._fetch(arrival)
            self._verify(arrival)
        except (IntegrityError, StoreError):
            arrival.discard()
            raise
        except OciProxyError:
            if arrival.spans.total == 0:
                arrival.discard()
            raise
        self.started = self.verified = True
        self._notify()
        arrival.commit(self._store.blobs)
        seconds = time.monotonic() - self._began
        log.event(
            logging.INFO,
            "filled",
            digest=self.digest,
            upstream=self._upstream,
            bytes=self.size,
            resumed=resumed or None,
            seconds=seconds,
        )
        return True

    def _adopt(self, arrival: Arrival) -> None:
        """Readers see this arrival from now on; those of another file were promised other bytes."""
        with self._lock:
            old = self._arrival
            if old is not None and self.started and not old.is_same_file(arrival):
                arrival.close()
                raise UpstreamUnavailable(self._upstream, "the process that fetched it gave up")
            self._arrival = arrival
        if old is not None:
            old.close()

    def _fetch(self, arrival: Arrival) -> None:
        try:
            self._fetch_all(arrival)
        except BaseException:
            # No helper may write to the file once it is closed.
            self.abort()
            self._helpers.wait()
            raise

    def _fetch_all(self, arrival: Arrival) -> None:
        while True:
            self._work(helping=False)
            self._hash_arrived(arrival)
            idle = self._helpers.idle
            with idle:
                idle.wait_for(lambda: self._helpers.count == 0 or not self._is_all_taken())
                if self._helpers.count == 0 and self._is_all_taken():
                    return

    def _work(self, *, helping: bool) -> None:
        while (claim := self._take_claim()) is not None:
            try:
                while claim.start < claim.stop:
                    retrying(tries=self._limits.retries, wait_max=self._limits.retry_wait_max)(
                        self._stream, claim, helping
                    )
            finally:
                with self._helpers.idle:
                    self._plan.release(claim)
                    self._helpers.idle.notify_all()

    def _help(self) -> None:
        """Another connection. Its failure is not the fill's: the leading one takes over what is
        left."""
        try:
            self._work(helping=True)
        except OciProxyError as exc:
            log.event(logging.DEBUG, "connection lost", digest=self.digest, reason=exc)

    def _stream(self, claim: Claim, helping: bool) -> None:
        """One request: as much of the claim as it brings."""
        if self._stopped.is_set():
            raise UpstreamUnavailable(self._upstream, "shutting down")
        whole = claim.start == 0 and claim.stop == self.size
        stream = self._open_blob(start=claim.start, stop=None if whole else claim.stop)
        with self._lock:
            self._streams.add(stream)
        first = claim.start
        try:
            self._learn(stream, claim)
            if helping and stream.start != claim.start:
                raise UpstreamUnavailable(self._upstream, "no ranges")
            self._receive(stream, claim)
        except UpstreamUnavailable as exc:
            if claim.start - first < _PROGRESS or self._stopped.is_set():
                raise
            log.event(
                logging.WARNING,
                "resuming",
                digest=self.digest,
                upstream=self._upstream,
                offset=claim.start,
                reason=exc.reason,
            )
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.close()

    def _learn(self, stream: BlobStream, claim: Claim) -> None:
        """What the response's head says about the blob."""
        with self._lock:
            if stream.size is not None:
                if self.size is not None and self.size != stream.size:
                    raise SizeMismatch(f"blob {self.digest}", self.size, stream.size)
                self.size = stream.size
            if self.size is not None:
                self._staged().set_size(self.size)
                self.started = True
            end = UNKNOWN if self.size is None else self.size
            body_end = end if stream.stop is None else stream.stop
            if body_end > claim.stop or stream.start != claim.start:
                # The upstream ignored the range: this body is the whole blob, take all of it.
                self._ranges = False
                claim.stop = end
            claim.stop = min(claim.stop, end)
        self._notify()

    def _receive(self, stream: BlobStream, claim: Claim) -> None:
        arrival = self._staged()
        offset = stream.start
        began = time.monotonic()
        while claim.start < claim.stop:
            data = stream.read(_CHUNK)
            if not data:
                if claim.stop < UNKNOWN:
                    raise UpstreamUnavailable(self._upstream, f"body ended at byte {offset}")
                self._ended(offset, claim)
                return
            stop = offset + len(data)
            self.bytes_fetched += len(data)
            if stop > claim.start:
                fresh = data[claim.start - offset :] if offset < claim.start else data
                self._put(arrival, claim, fresh[: claim.stop - claim.start])
            offset = stop
            if self._stopped.is_set():
                raise UpstreamUnavailable(self._upstream, "shutting down")
            self._call_for_help(began)
        if (
            claim.stop == self.size
            and offset <= claim.stop
            and stream.stop is None
            and stream.read(1)
        ):
            raise SizeMismatch(f"blob {self.digest}", self.size, f"more than {self.size}")

    def _put(self, arrival: Arrival, claim: Claim, data: bytes) -> None:
        start = claim.start
        arrival.write(start, data)
        with self._lock:
            claim.start = start + len(data)
            arrival.arrived(start, claim.start, flush=claim.start == claim.stop)
        self._notify()
        self._hasher.put(start, data)

    def _ended(self, size: int, claim: Claim) -> None:
        """A body without a stated length has ended: now the size is known."""
        with self._lock:
            self.size = claim.stop = size
            self._staged().set_size(size)
            self.started = True

    def _verify(self, arrival: Arrival) -> None:
        self._hash_arrived(arrival)
        if self._hasher.position != self.size:
            raise SizeMismatch(f"blob {self.digest}", self.size, self._hasher.position)
        actual = self._hasher.digest()
        if actual != self.digest:
            raise DigestMismatch("blob", self.digest, actual)

    def _hash_arrived(self, arrival: Arrival) -> None:
        def arrived_until(offset: int) -> int:
            with self._lock:
                return arrival.spans.stop_after(offset)

        with store_errors(arrival.path):
            self._hasher.catch_up(arrival.file, arrived_until)

    def _take_claim(self) -> Claim | None:
        with self._lock:
            return self._plan.take(self._staged().spans, self.size)

    def _is_all_taken(self) -> bool:
        return self._plan.free_gap(self._staged().spans, self.size) is None

    def _staged(self) -> Arrival:
        if self._arrival is None:
            raise UpstreamUnavailable(self._upstream, "the download has ended")
        return self._arrival

    def _take_helper(self) -> bool:
        """With the lock held: whether another connection may, and could, help."""
        if not self._ranges or self._arrival is None or not self._arrival.leading:
            return False
        if self._stopped.is_set() or self._is_all_taken():
            return False
        return self._helpers.take()

    def _call_for_help(self, began: float) -> None:
        elapsed = time.monotonic() - began
        if elapsed < _PATIENCE or self.size is None or self._helpers.is_full:
            return
        with self._lock:
            left = self.size - self._staged().spans.total
            rate = self.bytes_fetched / (time.monotonic() - self._began)
            helping = left > rate * _WORTH_HELP and self._take_helper()
        if helping:
            self._helpers.call(self._help)
