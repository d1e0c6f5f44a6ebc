"""The connections of one fill: bytes from an upstream into the file that the fill leads.

A blob of up to one segment is one request. A larger one is fetched segment by segment over one
connection, and over several as soon as one proves slow, or a reader waits for bytes that nobody is
fetching. What broke is asked for again from where it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    OciProxyError,
    SizeMismatch,
    UpstreamInvalid,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import retrying
from ociproxy.fetch.download.helpers import Helpers
from ociproxy.fetch.download.segments import UNKNOWN, Segment, Segments

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from threading import Event, Lock

    from ociproxy.config.settings import Fetch
    from ociproxy.fetch.backend import BlobStream, OpenBlob
    from ociproxy.store.staging import Ingest

_CHUNK: Final = 1024 * 1024
"""Bytes asked from a connection at a time; a few of these wait in memory to be hashed. Half as many
cost a fast upstream a tenth of its speed, twice as many bring nothing (measured on loopback)."""
_PROGRESS: Final = 256 * 1024
"""Bytes a broken connection must have brought for the next one not to count as another try."""
_PATIENCE: Final = 0.5
"""Seconds one connection may show how fast it is before others help."""
_WORTH_HELP: Final = 1.0
"""Seconds of work that must be left for help to be worth its connections."""
_CLAIM_SECONDS: Final = 0.5
"""Seconds of one connection's work that a request may be for where a segment is less: a fast
upstream is not asked again and again."""


@dataclass(frozen=True, slots=True)
class BlobOrigin:
    """Where a blob comes from, over how many connections at most; `partition` is who may share its
    bytes before they are verified (`Config.partition`)."""

    upstream: str
    partition: str
    open_blob: OpenBlob
    connections: int


class Delivered(Exception):
    """The backend has put the whole blob into the store, and nothing into the ingest."""


class _NoHelp(Exception):
    """Another connection brings the whole blob, and would be the only one that does."""


class Transfer:
    """Fetches what an ingest lacks. `lock` guards the ingest, the plan and the claims, and is
    held when `learned` is told the size; `progressed` and `arrived` are called without it."""

    def __init__(
        self,
        ingest: Ingest,
        source: BlobOrigin,
        limits: Fetch,
        *,
        size: int | None,
        plan: Segments,
        lock: Lock,
        stopped: Event,
        spawn: Callable[[Callable[[], None]], Future[None]],
        learned: Callable[[int], None],
        progressed: Callable[[], None],
        arrived: Callable[[int, bytes], None],
    ) -> None:
        self._ingest = ingest
        self._origin = source
        self._limits = limits
        self._size = size
        self._segments = plan
        self._lock = lock
        self._stopped = stopped
        self._learned = learned
        self._progressed = progressed
        self._arrived = arrived
        self._helpers = Helpers(lock, source.connections - 1, spawn)
        self._streams: set[BlobStream] = set()
        self._ranges = True
        self.bytes_fetched = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Returns when all of the blob is in the file. Raises what ended it; nobody writes to the
        file then. Raises Delivered where there is no more to do."""
        try:
            self._check_size(self._size or 0)
            self._fetch_all()
        except BaseException:
            self._stopped.set()
            self.abort()
            self._helpers.wait()
            raise

    def abort(self) -> None:
        """End every connection; whoever calls has set `stopped`."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def help_at(self, offset: int) -> None:
        """A reader waits for this byte: with another connection, if no other is on its way."""
        with self._lock:
            helping = (
                self._size is not None
                and not self._segments.is_coming(self._ingest.ranges, offset)
                and self._take_helper()
            )
        if helping:
            self._helpers.call(self._help)

    def _fetch_all(self) -> None:
        while True:
            self._work(helping=False)
            self._helpers.wait(lambda: not self._is_all_taken())
            with self._lock:
                if self._helpers.count == 0 and self._is_all_taken():
                    return

    def _work(self, *, helping: bool) -> None:
        limits = self._limits
        attempts = retrying(tries=limits.retries, wait_max=limits.retry_wait_max, sleep=self._sleep)
        while (segment := self._take_segment()) is not None:
            try:
                while segment.start < segment.stop:
                    attempts(self._stream, segment, helping)
            finally:
                with self._helpers.idle:
                    self._segments.release(segment)
                    self._helpers.idle.notify_all()

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _help(self) -> None:
        """Another connection. Its failure is not the fill's: the leading one takes over what is
        left."""
        try:
            with contextlib.suppress(Delivered, _NoHelp):
                self._work(helping=True)
        except OciProxyError as exc:
            log.event(logging.DEBUG, "connection lost", digest=self._ingest.digest, reason=exc)

    def _stream(self, segment: Segment, helping: bool) -> None:
        """One request: as much of the segment as it brings."""
        self._check_stopped()
        whole = segment.start == 0 and segment.stop == self._size
        stream = self._origin.open_blob(start=segment.start, stop=None if whole else segment.stop)
        with self._lock:
            self._streams.add(stream)
        first = segment.start
        try:
            self._learn(stream, segment)
            if stream.deliver():
                self.bytes_fetched += self._size or 0
                raise Delivered
            if helping and stream.start != segment.start:
                raise _NoHelp
            self._receive(stream, segment)
        except UpstreamUnavailable as exc:
            if segment.start - first < _PROGRESS or self._stopped.is_set():
                raise
            log.event(
                logging.WARNING,
                "resuming",
                digest=self._ingest.digest,
                upstream=self._origin.upstream,
                offset=segment.start,
                reason=exc.reason,
            )
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.close()

    def _learn(self, stream: BlobStream, segment: Segment) -> None:
        """What the response's head says about the blob."""
        with self._lock:
            if stream.size is not None:
                self._check_size(stream.size)
                if self._size not in (None, stream.size):
                    raise SizeMismatch(f"blob {self._ingest.digest}", self._size, stream.size)
                self._size = stream.size
            if self._size is not None:
                self._ingest.set_size(self._size)
                self._learned(self._size)
                segment.stop = min(segment.stop, self._size)
            elif stream.stop is not None:
                raise UpstreamInvalid(
                    self._origin.upstream, "sends a range without the blob's size"
                )
            if self._end(stream) > segment.stop or stream.start != segment.start:
                # The upstream ignored the range: this body is the whole blob.
                self._ranges = False
        self._progressed()

    def _receive(self, stream: BlobStream, segment: Segment) -> None:
        offset = stream.start
        began = time.monotonic()
        while self._goes_on(stream, segment, offset):
            data = stream.read(_CHUNK)
            if not data:
                if self._size is not None:
                    raise self._unavailable(f"body ended at byte {offset}")
                self._ended(offset, segment)
                return
            self.bytes_fetched += len(data)
            stop = offset + len(data)
            while self._goes_on(stream, segment, offset) and segment.start < stop:
                # Of a body that is more than what was asked for, what is here already is skipped.
                self._put(segment, data[segment.start - offset : segment.stop - offset])
            offset = stop
            self._check_stopped()
            self._call_for_help(began)

    def _goes_on(self, stream: BlobStream, segment: Segment, offset: int) -> bool:
        """Whether this body, from offset on, may still bring something of its segment, which is
        moved on where it is used up."""
        if segment.start < segment.stop:
            return True
        with self._lock:
            return self._segments.move(segment, self._ingest.ranges, offset, self._end(stream))

    def _end(self, stream: BlobStream) -> int:
        """Where the body ends in the blob."""
        ends = (UNKNOWN, self._size, stream.stop)
        return min(end for end in ends if end is not None)

    def _put(self, segment: Segment, data: bytes) -> None:
        start = segment.start
        self._check_size(start + len(data))
        self._ingest.write(start, data)
        with self._lock:
            segment.start = start + len(data)
            self._ingest.arrived(start, segment.start, flush=segment.start == segment.stop)
        self._progressed()
        self._arrived(start, data)

    def _ended(self, size: int, segment: Segment) -> None:
        """A body without a stated length has ended: now the size is known."""
        with self._lock:
            self._size = segment.stop = size
            self._ingest.set_size(size)
            self._learned(size)

    def _take_segment(self) -> Segment | None:
        with self._lock:
            most = int(self._rate() * _CLAIM_SECONDS / (1 + self._helpers.count))
            return self._segments.take(self._ingest.ranges, self._size, most)

    def _is_all_taken(self) -> bool:
        return self._segments.free_gap(self._ingest.ranges, self._size) is None

    def _take_helper(self) -> bool:
        """With the lock held: whether another connection may, and could, help."""
        if not self._ranges or self._stopped.is_set() or self._is_all_taken():
            return False
        return self._helpers.take()

    def _call_for_help(self, began: float) -> None:
        elapsed = time.monotonic() - began
        if elapsed < _PATIENCE or self._size is None or self._helpers.is_full:
            return
        with self._lock:
            left = self._size - self._ingest.ranges.total
            helping = left > self._rate() * _WORTH_HELP and self._take_helper()
        if helping:
            self._helpers.call(self._help)

    def _rate(self) -> float:
        """Bytes a second so far, over all connections."""
        return self.bytes_fetched / max(time.monotonic() - self._began, 0.001)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise self._unavailable("shutting down")

    def _check_size(self, size: int) -> None:
        """Of what is said, and of what has come where nothing is."""
        limit = self._limits.blob_limit
        if size > limit:
            raise BlobTooLarge(self._origin.upstream, self._ingest.digest, limit)

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(self._origin.upstream, reason)
