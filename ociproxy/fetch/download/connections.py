"""The HTTP connections of one download: bytes from an upstream into the file that it leads.

A blob of up to one segment is one request. A larger one is fetched segment by segment over one
connection. More connections help as soon as one proves slow, or when a reader waits for bytes that
no connection is on its way to. A broken request is asked again from where it stopped.

Tests: tests/fetch/download/test_fill.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import contextlib
import logging
import time
from threading import Condition, Event
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy import log
from ociproxy.errors import OciProxyError, UpstreamInvalid, UpstreamUnavailable
from ociproxy.fetch.download.assembly import UNKNOWN
from ociproxy.fetch.retry import resuming, retrying

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.fetch.download.assembly import Segment
    from ociproxy.fetch.download.download import Download

_CHUNK: Final = 1024 * 1024
"""Bytes asked from a connection at a time; a few of these wait in memory to be hashed. Half as many
cost a fast upstream a tenth of its speed, twice as many bring nothing (measured on loopback)."""
_PATIENCE: Final = 0.5
"""Seconds in which one connection may show how fast it is before others help."""
_WORTH_HELP: Final = 1.0
"""Seconds of work that must be left for help to be worth its connection."""
_SEGMENT_SECONDS: Final = 0.5
"""Seconds of one connection's work that a request may be for where a segment is less: a fast
upstream is not asked again and again."""
_LOOK: Final = 0.5
"""Seconds between looks at helpers whose thread has not begun."""


class BlobStream(Protocol):
    """The body of one blob request, undecoded bytes, read by one thread; `abort` may come from
    another."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole blob as the upstream states them, or None where it does not."""

    @property
    def start(self) -> int:
        """Offset of the first byte of the body: 0 where the upstream ignored the range."""

    @property
    def stop(self) -> int | None:
        """Offset just past the last byte of the body, or None where the upstream does not say."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, as soon as some are there; b"" at the end. Raises
        UpstreamUnavailable when the connection breaks, stalls, or ends before the stated length."""

    def abort(self) -> None:
        """Make a blocked read return soon; safe from any thread, at any time, more than once."""

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else drop it."""


class OpenBlob(Protocol):
    """Ask for the bytes [start, stop) of the blob; to its end where stop is None."""

    def __call__(self, *, start: int, stop: int | None) -> BlobStream: ...


class _NoHelp(Exception):
    """A helper's request brings the whole blob, which the leading connection brings already."""


class Connections:
    """A `Fetcher`. `most` is how many connections it may use at the same time. With `tries` 1 the
    first connection that breaks ends it; with more, so many in a row that brought nothing."""

    def __init__(
        self, download: Download, upstream: str, open_blob: OpenBlob, *, most: int, tries: int
    ) -> None:
        limits = download.limits
        self._download = download
        self._assembly = download.assembly
        self._upstream = upstream
        self._open_blob = open_blob
        self._most_helpers = most - 1
        self._tries = tries
        self._ended = Event()
        self._retries = retrying(tries=tries, wait_max=limits.retry_wait_max, stopped=self._ended)
        self._idle = Condition()
        """Guards what follows; told whenever a helper or a segment has ended."""
        self._streams: set[BlobStream] = set()
        self._helpers: set[Future[None]] = set()
        self._helper_count = 0
        self._ranges_work = True
        self._fetched = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Return when every byte is in the file. Raises what ended the leading connection; no
        other connection writes to the file then."""
        self._began = time.monotonic()
        try:
            while True:
                self._work(helping=False)
                self._wait_for_helpers(lambda: not self._assembly.is_all_taken)
                # Under the lock: a reader may call a helper between the two looks.
                with self._idle:
                    if self._helper_count == 0 and self._assembly.is_all_taken:
                        return
        except BaseException:
            self.abort()
            self._wait_for_helpers(lambda: False)
            raise

    def abort(self) -> None:
        self._ended.set()
        with self._idle:
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def help(self) -> None:
        """Start another connection, if one may and could help."""
        with self._idle:
            if self._helper_count >= self._most_helpers:
                return
            if not self._ranges_work or self._ended.is_set() or self._assembly.is_all_taken:
                return
            self._helper_count += 1
        try:
            helper = self._download.spawn(self._run_helper)
        except RuntimeError:
            self._helper_ended()  # the threads are being shut down
            return
        with self._idle:
            self._helpers.add(helper)
        helper.add_done_callback(self._helper_ended)

    # One connection

    def _work(self, *, helping: bool) -> None:
        while (segment := self._take_segment()) is not None:
            try:
                while segment.start < segment.stop:
                    self._retries(self._request, segment, helping)
            finally:
                self._assembly.release(segment)
                with self._idle:
                    self._idle.notify_all()

    def _take_segment(self) -> Segment | None:
        most = self._rate() * _SEGMENT_SECONDS / (1 + self._helper_count)
        return self._assembly.take(int(most))

    def _request(self, segment: Segment, helping: bool) -> None:
        """One request: as much of the segment as it brings."""
        self._check_running()
        whole = segment.start == 0 and segment.stop == self._download.size
        stream = self._open_blob(start=segment.start, stop=None if whole else segment.stop)
        with self._idle:
            self._streams.add(stream)
        first = segment.start
        try:
            self._check_running()  # an abort before the stream was in the set did not see it
            self._take_head(stream, segment)
            if helping and stream.start != segment.start:
                raise _NoHelp
            self._receive(stream, segment)
        except UpstreamUnavailable as exc:
            if self._ended.is_set() or not resuming(self._tries, segment.start - first):
                raise
            log.event(
                logging.WARNING,
                "resuming",
                digest=self._download.digest,
                upstream=self._upstream,
                offset=segment.start,
                reason=exc.reason,
            )
        finally:
            with self._idle:
                self._streams.discard(stream)
            stream.close()

    def _take_head(self, stream: BlobStream, segment: Segment) -> None:
        """What the response's head says about the blob."""
        size = self._download.claimed_size() if stream.size is None else stream.size
        if size is not None:
            self._download.learn_size(size)
            segment.stop = min(segment.stop, size)
        elif stream.stop is not None:
            raise UpstreamInvalid(self._upstream, "sends a range without the blob's size")
        if self._end(stream) > segment.stop or stream.start != segment.start:
            # The upstream ignored the range: this body is the whole blob.
            self._ranges_work = False

    def _receive(self, stream: BlobStream, segment: Segment) -> None:
        offset = stream.start
        began = time.monotonic()
        while self._goes_on(stream, segment, offset):
            data = stream.read(_CHUNK)
            if not data:
                if self._download.size is not None:
                    raise UpstreamUnavailable(self._upstream, f"body ended at byte {offset}")
                # A body without a stated length has ended: this is the size.
                self._download.learn_size(offset)
                segment.stop = offset
                return
            with self._idle:
                self._fetched += len(data)
                self._download.bytes_fetched += len(data)
            stop = offset + len(data)
            while self._goes_on(stream, segment, offset) and segment.start < stop:
                # A body that ignored the range also brings bytes that are here: skip them.
                self._download.put(segment, data[segment.start - offset : segment.stop - offset])
            offset = stop
            self._check_running()
            self._call_for_help(began)

    def _goes_on(self, stream: BlobStream, segment: Segment, offset: int) -> bool:
        """Whether this body, from offset on, may still bring bytes that are missing. A used-up
        segment is moved on to them."""
        if segment.start < segment.stop:
            return True
        return self._assembly.move(segment, offset, self._end(stream))

    def _end(self, stream: BlobStream) -> int:
        """Where the body ends in the blob."""
        ends = (UNKNOWN, self._download.size, stream.stop)
        return min(end for end in ends if end is not None)

    # Helping connections

    def _call_for_help(self, began: float) -> None:
        """Where what is left is more than this connection will bring in a moment."""
        if time.monotonic() - began < _PATIENCE or self._download.size is None:
            return
        if self._assembly.bytes_left > self._rate() * _WORTH_HELP:
            self.help()

    def _run_helper(self) -> None:
        """In a thread of its own. A helper's failure is not the download's: the leading connection
        takes over what is left."""
        try:
            with contextlib.suppress(_NoHelp):
                self._work(helping=True)
        except OciProxyError as exc:
            log.event(logging.DEBUG, "connection lost", digest=self._download.digest, reason=exc)

    def _helper_ended(self, helper: Future[None] | None = None) -> None:
        with self._idle:
            if helper is not None:
                self._helpers.discard(helper)
            self._helper_count -= 1
            self._idle.notify_all()

    def _wait_for_helpers(self, enough: Callable[[], bool]) -> None:
        """Until no helper is left, or `enough`.

        Helpers whose turn has not come are cancelled: other downloads that wait for help as this
        one does may hold their threads.
        """
        while True:
            with self._idle:
                helpers = list(self._helpers)
            for helper in helpers:
                helper.cancel()
            with self._idle:
                # A helper that was called just now may not be in the set yet: look again.
                if self._idle.wait_for(lambda: self._helper_count == 0 or enough(), _LOOK):
                    return

    def _rate(self) -> float:
        """Bytes a second so far, over all connections."""
        return self._fetched / max(time.monotonic() - self._began, 0.001)

    def _check_running(self) -> None:
        if self._ended.is_set() or self._download.stopped.is_set():
            raise UpstreamUnavailable(self._upstream, "shutting down")
