"""Fills: at most one download per digest and partition, whichever repository it is asked for.

A `Fill` is a download as the event loop sees it: readers wait on it for bytes, each at its own
pace, and none of them owns it. `Fills` keeps the running ones, and a bounded queue of blobs to
fetch in the background.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import IntegrityError, OciProxyError, UpstreamUnavailable
from ociproxy.fetch.download.download import Download, State
from ociproxy.fetch.upstreams.threads import LISTED, UNLISTED, UpstreamThreads

if TYPE_CHECKING:
    from ociproxy.config.settings import Fetch
    from ociproxy.fetch.backend import Backend
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_Key = tuple[str, "Digest"]
_Start = Callable[["Repository", "Descriptor"], "Fill | None"]

_NOTIFY_INTERVAL: Final = 0.02
"""Seconds between wake-ups of the readers of one fill: long enough to batch what a fast upstream
sends. More wake-ups take processor time from the hashing, which the last byte waits for."""
_BACKGROUND_QUEUE: Final = 10_000
"""Blobs that may wait for a background fill. Further ones are fetched when a client asks."""


class Fill:
    """One blob arriving. All methods belong to the event loop's thread."""

    def __init__(self, download: Download, repository: Repository) -> None:
        self.repository = repository
        self.download = download
        self.error: Exception | None = None
        self.done = False
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._scheduled = False

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
        while not self.done and (
            told.state is State.STARTING or (told.doubted and told.state is not State.VERIFIED)
        ):
            await self._change()

    async def available(self, offset: int) -> int:
        """Wait for the byte at offset; return the end of the bytes that are there. Raises what
        ended the fill."""
        stop = self.download.assembly.available(offset)
        if stop > offset:
            return stop
        self.download.want(offset)
        try:
            while (stop := self.download.assembly.available(offset)) <= offset:
                await self._change()
        finally:
            self.download.assembly.unwant(offset)
        return stop

    def duplicate_file(self) -> int:
        """A file descriptor of the arriving bytes; the caller closes it."""
        return self.download.duplicate_file()

    async def finished(self) -> None:
        """Wait until the blob is in the store. Raises what ended the fill."""
        while not self.done:
            await self._change()

    def notify(self) -> None:
        """Thread-safe. Coalesces wake-ups of the readers; never drops the final one."""
        if not self._scheduled or self._is_whole:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                return  # the loop is closed, and its readers with it

    def end(self, error: Exception | None) -> None:
        """The download's thread has ended, with this error or well."""
        self.error = error
        self.done = error is None
        self.download.close()
        self._wake()

    def abandon(self, error: Exception) -> None:
        """Give readers this error. The download's thread goes on, and its end will be unknown."""
        self.error = error
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.done or self.error or self._is_whole or not self.download.bytes_fetched:
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

    async def _change(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self.done:
            return
        await self._changed.wait()
        if self.error is not None:
            raise self.error.with_traceback(None)


class Fills:
    """Owns the threads and tasks of all fills; `close` ends them."""

    def __init__(self, store: Store, limits: Fetch) -> None:
        self._store = store
        self._limits = limits
        self._running: dict[_Key, Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = UpstreamThreads("fills", size=limits.fills, queue=limits.queue)
        # For further connections of a download: on average one for each fill.
        self._helpers = ThreadPoolExecutor(limits.fills, thread_name_prefix="helper")
        self._queue: deque[tuple[_Start, Repository, Descriptor, _Key]] = deque()
        self._queued: set[_Key] = set()
        self._workers = 0
        self._closed = False
        self._ended_bytes = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that upstreams have sent for all fills, running and ended."""
        running = sum(fill.download.bytes_fetched for fill in self._running.values())
        return self._ended_bytes + running

    def running(self, digest: Digest, partition: str) -> Fill | None:
        return self._running.get((partition, digest))

    def check_room(self, partition: str) -> None:
        """Raises Busy where as many fills are running and waiting as may. Background fills do not
        ask: `background_fills` bounds them."""
        self._threads.check_room(_pool_of(partition))

    def start(
        self,
        repository: Repository,
        digest: Digest,
        *,
        partition: str,
        backend: Backend,
        size: int | None,
        ended: Callable[[OciProxyError | None], None],
    ) -> Fill:
        """The fill of this digest in this partition (`Config.partition`): the one that runs, else a
        new one. `ended` is told how a new one ends."""
        fill = self.running(digest, partition)
        if fill is None:
            fill = self._launch(repository, digest, partition, backend, size, ended, again=True)
        return fill

    def queue(
        self, repository: Repository, blob: Descriptor, partition: str, start: _Start
    ) -> None:
        """Fetch this blob in the background, when it is its turn. `start` begins it, and returns
        None where it is stored by then."""
        key = (partition, blob.digest)
        if (
            self._closed
            or self._limits.background_fills == 0
            or key in self._queued
            or key in self._running
            or len(self._queue) >= _BACKGROUND_QUEUE
        ):
            return
        self._queue.append((start, repository, blob, key))
        self._queued.add(key)
        if self._workers < self._limits.background_fills:
            self._workers += 1
            self._own(asyncio.create_task(self._work_queue()))

    def take_queue(self) -> list[tuple[Repository, Descriptor]]:
        """Empty the queue. Returns the blobs that waited in it."""
        taken = [(repository, blob) for _, repository, blob, _ in self._queue]
        self._queue.clear()
        self._queued.clear()
        return taken

    async def drain(self) -> None:
        """Return when the running fills have ended, and those that wait in the queue."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End every fill soon, keeping what arrived. Return when their tasks have ended, after
        `fetch.timeouts.stall` at the latest."""
        self._closed = True
        self._queue.clear()
        for fill in list(self._running.values()):
            fill.download.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.timeouts.stall)
        self._threads.shutdown()
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _launch(
        self,
        repository: Repository,
        digest: Digest,
        partition: str,
        backend: Backend,
        size: int | None,
        ended: Callable[[OciProxyError | None], None],
        *,
        again: bool,
    ) -> Fill:
        fill: Fill
        download = Download(
            repository,
            digest,
            self._store,
            self._limits,
            partition=partition,
            expected_size=size,
            believes=again,
            notify=lambda: fill.notify(),
            spawn=self._helpers.submit,
        )
        fill = Fill(download, repository)
        if self._closed:
            fill.end(UpstreamUnavailable(repository.registry, "shutting down"))
            return fill

        fetch = partial(backend.fetch_blob, repository, digest, tries=self._limits.retries)
        running = self._threads.submit(_pool_of(partition), lambda: download.run(fetch))

        async def run() -> None:
            error: Exception | None = None
            try:
                await running
                ended(None)
            except OciProxyError as exc:
                error = exc
                if not (again and isinstance(exc, IntegrityError)):
                    ended(exc)
                log.event(logging.WARNING, "fill failed", digest=digest, reason=exc)
            except Exception as exc:  # noqa: BLE001 a task's end: reported, and passed to every reader
                error = exc
                log.failure("fill failed", exc, digest=digest)
            except asyncio.CancelledError:
                # The process ends. The thread may go on for a moment: its file stays open.
                fill.abandon(UpstreamUnavailable(repository.registry, "shutting down"))
                raise
            finally:
                del self._running[partition, digest]
                self._ended_bytes += download.bytes_fetched
            fill.end(error)
            if isinstance(error, IntegrityError) and again:
                # The bytes may have been damaged on their way, or follow a stale beginning: fetch
                # the blob once more, from zero.
                # Without the claimed size, which may be what was wrong.
                self._launch(repository, digest, partition, backend, None, ended, again=False)

        self._running[partition, digest] = fill
        self._own(asyncio.create_task(run()))
        return fill

    async def _work_queue(self) -> None:
        try:
            while self._queue and not self._closed:
                start, repository, blob, key = self._queue.popleft()
                self._queued.discard(key)
                try:
                    fill = start(repository, blob)
                    if fill is not None:
                        await fill.finished()
                except OciProxyError:
                    continue  # logged where it happened
        finally:
            self._workers -= 1

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pool_of(partition: str) -> str:
    """Registries that clients name must not hold up those that the operator listed."""
    return UNLISTED if partition else LISTED
