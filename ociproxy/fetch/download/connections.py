"""The HTTP connections of one download: bytes from an upstream into the file that it leads.

A blob of up to one segment is one request. A larger one is fetched segment by segment over one
connection. More connections help as soon as one proves slow. A helper also asks for the bytes that
a reader waits for, if they are not coming soon: the connection that would have reached them later
stops where they begin. A broken request is asked again from where it stopped. Once bytes have come,
an odd answer, such as a refusal or a captive portal's page, costs one try and not the download.
"""

from __future__ import annotations

import contextlib
import logging
import time
from functools import partial
from threading import Condition, Event
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    BlobUnknown,
    Interrupted,
    NameUnknown,
    OciProxyError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.download.assembly import READ, UNKNOWN
from ociproxy.fetch.retry import Resumption

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.fetch.backend import BlobStream, OpenBlob
    from ociproxy.fetch.download.assembly import Segment
    from ociproxy.fetch.download.download import Download

_PATIENCE: Final = 0.5
"""Seconds in which one connection may show how fast it is before others help."""
_WORTH_HELP: Final = 1.0
"""Seconds of work that must be left for help to be worth its connection."""
_SEGMENT_SECONDS: Final = 0.5
"""Seconds of one connection's work that a request may be for where a segment is less: a fast
upstream is not asked again and again."""
_OPENING: Final = 0.1
"""Seconds that a further connection is taken to cost at least: what comes as soon is waited for."""
_LOOK: Final = 0.5
"""Seconds between looks at helpers whose thread has not begun."""


class _NoHelp(Exception):
    """A helper's request brings what another connection brings already, or just as soon."""


class Connections:
    """A `Fetcher`. `most` is how many connections it may use at the same time. With `tries` 1 the
    first connection that breaks ends it; with more, `Resumption` says when."""

    def __init__(
        self, download: Download, upstream: str, open_blob: OpenBlob, *, most: int, tries: int
    ) -> None:
        self._download = download
        self._assembly = download.assembly
        self._upstream = upstream
        self._open_blob = open_blob
        self._most_helpers = most - 1
        self._ended = Event()
        self._resumption = partial(
            Resumption, tries=tries, limits=download.limits, sleep=self._ended.wait
        )
        self._changed = Condition()
        """Guards what follows; told whenever a helper or a segment has ended."""
        self._streams: set[BlobStream] = set()
        self._helpers: set[Future[None]] = set()
        self._helper_count = 0
        self._ranges_work = True
        self._fetched = 0
        self._began: float | None = None
        """When the first body began (monotonic seconds)."""
        self._splitting = False
        """A helper is about to ask for what a reader waits for."""
        self._opening = _OPENING
        """Seconds until the latest response's head came."""
        self._help_from = 0.0
        """When the next helper may be called (monotonic seconds): later after one that failed."""
        self._stated_size: int | None = None
        """What the upstream has said in this run."""

    def run(self) -> None:
        """Return when every byte is in the file. Raises what ended the leading connection; no
        other connection writes to the file then."""
        try:
            while True:
                self._work(helping=False)
                self._wait_for_helpers(lambda: not self._assembly.is_all_taken)
                # Under the lock: a reader may call a helper between the two looks.
                with self._changed:
                    if self._helper_count == 0 and self._assembly.is_all_taken:
                        return
        except BaseException:
            self.abort()
            self._wait_for_helpers(lambda: False)
            raise

    def abort(self) -> None:
        self._ended.set()
        with self._changed:
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def help(self) -> None:
        """Start another connection, if one may and could help."""
        with self._changed:
            if self._helper_count >= self._most_helpers or time.monotonic() < self._help_from:
                return
            if not self._ranges_work or self._ended.is_set():
                return
            if self._assembly.is_all_taken and (
                self._splitting or self._assembly.far_awaited(0) is None
            ):
                return
            self._helper_count += 1
        try:
            helper = self._download.spawn(self._run_helper)
        except RuntimeError:
            self._helper_ended()  # the threads are being shut down
            return
        with self._changed:
            self._helpers.add(helper)
        helper.add_done_callback(self._helper_ended)

    # One connection

    def _work(self, *, helping: bool) -> None:
        resumption: Resumption | None = None
        while (segment := self._take_segment()) is not None:
            try:
                while segment.start < segment.stop:
                    resumption = self._try_request(segment, helping, resumption)
            finally:
                self._assembly.release(segment)
                with self._changed:
                    self._changed.notify_all()

    def _try_request(
        self, segment: Segment, helping: bool, resumption: Resumption | None
    ) -> Resumption | None:
        """A request that breaks returns, too, where another one is to follow: the tries so far."""
        first, began = segment.start, time.monotonic()
        try:
            self._request(segment, helping)
        except (UpstreamError, BlobUnknown, NameUnknown) as exc:
            resumption = resumption or self._resumption(began=began)
            resumption.brought(segment.start - first)
            odd = not isinstance(exc, UpstreamUnavailable) and (helping or not self._fetched)
            if odd or self._ended.is_set() or isinstance(exc, BlobTooLarge):
                raise
            resumption.wait(exc)
            log.event(
                logging.WARNING,
                "resuming",
                digest=self._download.digest,
                upstream=self._upstream,
                offset=segment.start,
                reason=exc.reason,
            )
        else:
            if resumption is not None:
                resumption.brought(segment.start - first)
        return resumption

    def _take_segment(self) -> Segment | None:
        most = self._rate() * _SEGMENT_SECONDS / (1 + self._helper_count)
        return self._assembly.take(int(most))

    def _request(self, segment: Segment, helping: bool, *, split: bool = False) -> None:
        """One request: as much of the segment as it brings. With `split` the segment is taken from
        the connection that covers it, once the upstream has proved to honour the range."""
        self._check_running()
        began = time.monotonic()
        asked = segment.stop
        whole = segment.start == 0 and asked == self._download.size
        stream = self._open_blob(start=segment.start, stop=None if whole else asked)
        with self._changed:
            self._streams.add(stream)
        try:
            self._check_running()  # an abort before the stream was in the set did not see it
            self._take_head(stream, segment, asked)
            now = time.monotonic()
            self._opening = max(now - began, _OPENING)
            self._began = self._began or now
            if helping and stream.start != segment.start:
                raise _NoHelp
            if split:
                if not self._assembly.split(segment):
                    raise _NoHelp
                with self._changed:
                    self._splitting = False
            self._receive(stream, segment)
        finally:
            with self._changed:
                self._streams.discard(stream)
            stream.close()

    def _take_head(self, stream: BlobStream, segment: Segment, asked: int) -> None:
        """What the response's head says about the blob."""
        if self._stated_size not in (None, stream.size):
            # Not the blob's size has changed: a captive portal answers in the upstream's place.
            reason = f"answers with a body of {stream.size} bytes, before of {self._stated_size}"
            raise UpstreamUnavailable(self._upstream, reason)
        size = self._download.claimed_size() if stream.size is None else stream.size
        if size is not None:
            self._download.learn_size(size, told=stream.size is not None, encoding=stream.encoding)
            self._stated_size = stream.size
            self._assembly.end_at(segment, size)
        elif stream.stop is not None:
            raise UpstreamInvalid(self._upstream, "sends a range without the blob's size")
        if self._end(stream) > asked or stream.start != segment.start:
            # The upstream ignored the range: this body is the whole blob.
            self._ranges_work = False

    def _receive(self, stream: BlobStream, segment: Segment) -> None:
        offset, first = stream.start, segment.start
        began = time.monotonic()
        while self._goes_on(stream, segment, offset):
            data = stream.read(READ)
            if not data:
                if not self._is_end(offset, new=segment.start > first):
                    raise UpstreamUnavailable(self._upstream, f"body ended at byte {offset}")
                self._download.learn_size(offset)
                segment.stop = offset
                return
            with self._changed:
                self._fetched += len(data)
                self._download.bytes_fetched += len(data)
            stop = offset + len(data)
            while self._goes_on(stream, segment, offset) and segment.start < stop:
                # A body that ignored the range also brings bytes that are here: skip them.
                self._download.put(segment, data[segment.start - offset : segment.stop - offset])
            offset = stop
            self._check_running()
            self._call_for_help(began)

    def _is_end(self, offset: int, *, new: bool) -> bool:
        """Whether the blob ends where a body without a stated length has ended: nothing else tells
        its size, or only a claim, which the digest refutes."""
        hasher = self._assembly.hasher
        if self._download.size is None or hasher is None:
            return True
        return self._stated_size is None and hasher.is_whole(offset, new=new)

    def _goes_on(self, stream: BlobStream, segment: Segment, offset: int) -> bool:
        """Whether this body, from offset on, may still bring bytes that are missing. A used-up
        segment is moved on to them."""
        if segment.start < segment.stop:
            return True
        # Bytes that are here are skipped only where the upstream would send them again anyway.
        skipped = offset + READ if self._ranges_work else UNKNOWN
        return self._assembly.move(segment, offset, min(self._end(stream), skipped))

    def _end(self, stream: BlobStream) -> int:
        """Where the body ends in the blob."""
        return min(end for end in (UNKNOWN, self._download.size, stream.stop) if end is not None)

    # Helping connections

    def _call_for_help(self, began: float) -> None:
        """Where a reader's bytes are far off, or what is left is more than this connection will
        bring in a moment."""
        if self._assembly.far_awaited(0) is not None:
            self.help()
        patient = time.monotonic() - began < _PATIENCE or self._download.size is None
        if not patient and self._assembly.bytes_left > self._rate() * _WORTH_HELP:
            self.help()

    def _run_helper(self) -> None:
        """In a thread of its own. A helper's failure is not the download's: the leading connection
        takes over what is left."""
        try:
            with contextlib.suppress(_NoHelp):
                self._split_for_reader()
                self._work(helping=True)
        except OciProxyError as exc:
            wait = exc.retry_after if isinstance(exc, UpstreamRateLimited) else _PATIENCE
            self._help_from = time.monotonic() + wait
            log.event(logging.DEBUG, "connection lost", digest=self._download.digest, reason=exc)

    def _split_for_reader(self) -> None:
        """Bring what a reader waits for out of a request that has far to go until there."""
        with self._changed:
            if self._splitting or self._assembly.far_awaited(0) is None:
                return
            self._splitting = True
        # A connection that has just begun may prove fast enough, and one that was fast may stall.
        self._ended.wait(_OPENING - (time.monotonic() - (self._began or 0.0)))
        while (segment := self._far_awaited()) is None and self._assembly.far_awaited(0):
            if self._ended.wait(_OPENING):
                break
        try:
            if segment is not None:
                self._request(segment, helping=True, split=True)
        finally:
            taken = segment is not None and self._assembly.release(segment)
            with self._changed:
                if not taken:
                    self._splitting = False
                self._changed.notify_all()

    def _far_awaited(self) -> Segment | None:
        """What a further connection would bring sooner than the one that is on its way to it."""
        each = self._rate() / max(len(self._streams), 1)
        return self._assembly.far_awaited(int(each * self._opening))

    def _helper_ended(self, helper: Future[None] | None = None) -> None:
        with self._changed:
            if helper is not None:
                self._helpers.discard(helper)
            self._helper_count -= 1
            self._changed.notify_all()

    def _wait_for_helpers(self, enough: Callable[[], bool]) -> None:
        """Until no helper is left, or `enough`.

        Helpers whose turn has not come are cancelled: other downloads that wait for help as this
        one does may hold their threads.
        """
        while True:
            with self._changed:
                helpers = list(self._helpers)
            for helper in helpers:
                helper.cancel()
            with self._changed:
                # A helper that was called just now may not be in the set yet: look again.
                if self._changed.wait_for(lambda: self._helper_count == 0 or enough(), _LOOK):
                    return

    def _rate(self) -> float:
        """Bytes a second so far, over all connections."""
        if self._began is None:
            return 0.0
        return self._fetched / max(time.monotonic() - self._began, 0.001)

    def _check_running(self) -> None:
        if self._ended.is_set() or self._download.stopped.is_set():
            raise Interrupted(self._upstream, "shutting down")
