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
from ociproxy.fetch.helpers import Helpers
from ociproxy.fetch.plan import UNKNOWN, Claim, Plan
from ociproxy.fetch.upstream import retrying

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from threading import Event, Lock

    from ociproxy.config.settings import Fetch
    from ociproxy.fetch.upstream import BlobStream, OpenBlob
    from ociproxy.store.staging import Arrival

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
class Source:
    """Where a blob comes from, over how many connections at most; `partition` is who may share its
    bytes before they are verified (`Config.partition`)."""

    upstream: str
    partition: str
    open_blob: OpenBlob
    connections: int


class Delivered(Exception):
    """The backend has put the whole blob into the store, and nothing into the arrival."""


class _NoHelp(Exception):
    """Another connection brings the whole blob, and would be the only one that does."""


class Transfer:
    """Fetches what an arrival lacks. `lock` guards the arrival, the plan and the claims, and is
    held when `learned` is told the size; `progressed` and `arrived` are called without it."""

    def __init__(
        self,
        arrival: Arrival,
        source: Source,
        limits: Fetch,
        *,
        size: int | None,
        plan: Plan,
        lock: Lock,
        stopped: Event,
        spawn: Callable[[Callable[[], None]], Future[None]],
        learned: Callable[[int], None],
        progressed: Callable[[], None],
        arrived: Callable[[int, bytes], None],
    ) -> None:
        self._arrival = arrival
        self._source = source
        self._limits = limits
        self._size = size
        self._plan = plan
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
                and not self._plan.is_coming(self._arrival.spans, offset)
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
        while (claim := self._take_claim()) is not None:
            try:
                while claim.start < claim.stop:
                    attempts(self._stream, claim, helping)
            finally:
                with self._helpers.idle:
                    self._plan.release(claim)
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
            log.event(logging.DEBUG, "connection lost", digest=self._arrival.digest, reason=exc)

    def _stream(self, claim: Claim, helping: bool) -> None:
        """One request: as much of the claim as it brings."""
        self._check_stopped()
        whole = claim.start == 0 and claim.stop == self._size
        stream = self._source.open_blob(start=claim.start, stop=None if whole else claim.stop)
        with self._lock:
            self._streams.add(stream)
        first = claim.start
        try:
            self._learn(stream, claim)
            if stream.deliver():
                self.bytes_fetched += self._size or 0
                raise Delivered
            if helping and stream.start != claim.start:
                raise _NoHelp
            self._receive(stream, claim)
        except UpstreamUnavailable as exc:
            if claim.start - first < _PROGRESS or self._stopped.is_set():
                raise
            log.event(
                logging.WARNING,
                "resuming",
                digest=self._arrival.digest,
                upstream=self._source.upstream,
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
                self._check_size(stream.size)
                if self._size not in (None, stream.size):
                    raise SizeMismatch(f"blob {self._arrival.digest}", self._size, stream.size)
                self._size = stream.size
            if self._size is not None:
                self._arrival.set_size(self._size)
                self._learned(self._size)
                claim.stop = min(claim.stop, self._size)
            elif stream.stop is not None:
                raise UpstreamInvalid(
                    self._source.upstream, "sends a range without the blob's size"
                )
            if self._end(stream) > claim.stop or stream.start != claim.start:
                # The upstream ignored the range: this body is the whole blob.
                self._ranges = False
        self._progressed()

    def _receive(self, stream: BlobStream, claim: Claim) -> None:
        offset = stream.start
        began = time.monotonic()
        while self._goes_on(stream, claim, offset):
            data = stream.read(_CHUNK)
            if not data:
                if self._size is not None:
                    raise self._unavailable(f"body ended at byte {offset}")
                self._ended(offset, claim)
                return
            self.bytes_fetched += len(data)
            stop = offset + len(data)
            while self._goes_on(stream, claim, offset) and claim.start < stop:
                # Of a body that is more than what was asked for, what is here already is skipped.
                self._put(claim, data[claim.start - offset : claim.stop - offset])
            offset = stop
            self._check_stopped()
            self._call_for_help(began)

    def _goes_on(self, stream: BlobStream, claim: Claim, offset: int) -> bool:
        """Whether this body, from offset on, may still bring something of its claim, which is moved
        on where it is used up."""
        if claim.start < claim.stop:
            return True
        with self._lock:
            return self._plan.move(claim, self._arrival.spans, offset, self._end(stream))

    def _end(self, stream: BlobStream) -> int:
        """Where the body ends in the blob."""
        ends = (UNKNOWN, self._size, stream.stop)
        return min(end for end in ends if end is not None)

    def _put(self, claim: Claim, data: bytes) -> None:
        start = claim.start
        self._check_size(start + len(data))
        self._arrival.write(start, data)
        with self._lock:
            claim.start = start + len(data)
            self._arrival.arrived(start, claim.start, flush=claim.start == claim.stop)
        self._progressed()
        self._arrived(start, data)

    def _ended(self, size: int, claim: Claim) -> None:
        """A body without a stated length has ended: now the size is known."""
        with self._lock:
            self._size = claim.stop = size
            self._arrival.set_size(size)
            self._learned(size)

    def _take_claim(self) -> Claim | None:
        with self._lock:
            most = int(self._rate() * _CLAIM_SECONDS / (1 + self._helpers.count))
            return self._plan.take(self._arrival.spans, self._size, most)

    def _is_all_taken(self) -> bool:
        return self._plan.free_gap(self._arrival.spans, self._size) is None

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
            left = self._size - self._arrival.spans.total
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
            raise BlobTooLarge(self._source.upstream, self._arrival.digest, limit)

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(self._source.upstream, reason)
