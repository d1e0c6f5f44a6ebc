"""One blob arriving, as the event loop sees it: readers wait on a `Fill` for bytes, each at its own
pace, and none of them owns it. `fills` keeps the running ones.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy.clock import waiting_for_upstream
from ociproxy.errors import Interrupted, SizeMismatch
from ociproxy.fetch.download.assembly import State
from ociproxy.fetch.download.download import Download
from ociproxy.metrics.counters import FILLS_FAILED, FILLS_RESUMED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from ociproxy.oci.digest import Digest

_NOTIFY_INTERVAL: Final = 0.02
"""Seconds between wake-ups of the readers of one fill: long enough to batch what a fast upstream
sends. More wake-ups take processor time from the hashing, which the last byte waits for."""


class Fill:
    """One blob arriving. All methods belong to the event loop's thread."""

    on_disk = True
    """Whether an open of its file may wait for the disk."""

    def __init__(self, download: Download) -> None:
        self.repository = download.repository
        self.download = download
        self.error: Exception | None = None
        self.succeeded = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._listening = 0
        """Readers that want to hear of news before the end."""
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._running: Future[None] | None = None
        self._waiting = 0
        self._readers = 0
        self._progress = (self._loop.time(), 0)
        download.notify = self.notify

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a client or a load needs this fill: it may then be as slow as it is."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    def use_thread(self, running: Future[None]) -> None:
        """The download begins when this future does."""
        self._running = running

    def is_idle(self, seconds: float, rate: int) -> bool:
        """Whether the fill has had no reader, and brought fewer than `rate` bytes a second, for
        this long."""
        now, has = self._loop.time(), self.download.bytes_fetched
        if self._readers or not self.download.is_arriving:
            self._progress = (now, has)
            return False
        since, had = self._progress
        if now - since < seconds:
            return False
        self._progress = (now, has)
        return has - had < rate * (now - since)

    @property
    def digest(self) -> Digest:
        return self.download.digest

    @property
    def size(self) -> int | None:
        """Bytes; the right number once `started` has returned. None where the upstream tells it
        with the end of the blob only."""
        return self.download.size

    async def started(self) -> None:
        """Wait until the size is known, and not doubted; or until bytes arrive for a while without
        it. Raises what ended the fill before that."""
        told = self.download
        with self.listening():
            while not self.succeeded and (
                told.state is State.STARTING or (told.doubted and told.state is not State.VERIFIED)
            ):
                await self.change()

    async def available(self, offset: int, *, early: bool = False) -> int:
        """Wait for the byte at offset; return the end of the bytes that are there. The last byte
        is there once all are verified, unless it may come `early`. Raises what ended the fill."""
        available = partial(self.download.assembly.available, offset, early=early)
        stop = available()
        if stop > offset:
            return stop
        self.download.want(offset)
        try:
            with self.listening():
                while (stop := available()) <= offset:
                    self._check_end(offset)
                    await self.change()
        finally:
            self.download.assembly.unwant(offset)
        return stop

    def _check_end(self, offset: int) -> None:
        """Raises SizeMismatch for a reader who waits for bytes behind the end: its response has the
        length that was claimed of the blob."""
        if self.succeeded:
            raise SizeMismatch(f"blob {self.digest}", f"above {offset}", self.size)

    @property
    def files(self) -> int:
        """Changes when readers have to go on in another file."""
        return self.download.assembly.files

    def duplicate_file(self) -> int:
        """A file descriptor of the arriving bytes; the caller closes it."""
        return self.download.duplicate_file()

    async def finished(self) -> None:
        """Wait until the blob is verified, and in the store if that has room for it. Raises what
        ended the fill."""
        await self._wait(self._ended)

    def leave(self) -> None:
        """A response that read it has ended. The fill goes on: other clients may read it."""

    def notify(self) -> None:
        """Thread-safe. Coalesces wake-ups of the readers; never drops the final one."""
        if self._listening and (not self._scheduled or self._is_whole):
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                return  # the loop is closed, and its readers with it

    def end(self, error: Exception | None) -> None:
        """The download's thread has ended, with this error or well."""
        self.error = error
        self.succeeded = error is None
        self.download.close()
        self._ended.set()
        self._wake()
        if error is None and self.download.bytes_resumed:
            FILLS_RESUMED.add()
        if error is not None and not isinstance(error, Interrupted):
            FILLS_FAILED.add(type(error).__name__)

    def abandon(self, error: Exception) -> None:
        """Give readers this error. The download's thread goes on, and its end will be unknown."""
        self.error = error
        self._ended.set()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.succeeded or self.error or self._is_whole or not self.download.bytes_fetched:
            # No news follows the last bytes. The first bytes must not wait for the end of a pause
            # that began when the size came.
            self._scheduled = False
        else:
            self._loop.call_later(_NOTIFY_INTERVAL, self._rearm)

    def _rearm(self) -> None:
        # News during the pause scheduled no wake-up: wake the readers once more.
        self._scheduled = False
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def _is_whole(self) -> bool:
        return self.download.state >= State.WHOLE

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a reader looks and waits for a `change` in turn. The download's thread stores its
        news first. Then it wakes readers, if there are any."""
        self._listening += 1
        try:
            yield
        finally:
            self._listening -= 1

    async def change(self) -> None:
        """Wait for news. Raises what ended the fill."""
        await self._wait(self._changed)

    async def _wait(self, event: asyncio.Event) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self.succeeded:
            return
        self._waiting += 1
        try:
            with waiting_for_upstream():
                await event.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and self._running is not None:
                # No client and no background worker waits any more. A download that has its
                # thread goes on; one that waits for a thread is dropped.
                self._running.cancel()
        if self.error is not None:
            raise self.error.with_traceback(None)
