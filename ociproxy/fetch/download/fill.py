"""Fills: at most one download per digest and partition, whichever repository it is asked for.

A `Fill` is a download as the event loop sees it: readers wait on it for bytes, each at its own
pace, and none of them owns it. `Fills` keeps the running ones, and a bounded queue of blobs to
fetch in the background.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import IntegrityError, OciProxyError, UpstreamUnavailable
from ociproxy.fetch.download.download import Download, State
from ociproxy.fetch.upstreams.threads import UpstreamThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Backend
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_Key = tuple[str, "Digest"]

_NOTIFY_INTERVAL: Final = 0.02
"""Seconds between wake-ups of the readers of one fill: long enough to batch what a fast upstream
sends. More wake-ups take processor time from the hashing, which the last byte waits for."""
_BACKGROUND_QUEUE: Final = 10_000
"""Blobs that may wait for a background fill. Further ones are fetched when a client asks."""
_LONG_WAIT: Final = 1.0
"""Seconds after which a fill that waited for a thread asks anew whether its upstream may be asked:
the breaker may have opened."""
_WATCH_INTERVAL: Final = 1.0
"""Seconds between looks at fills without a reader."""


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
        self._running: Future[None] | None = None
        self._waiting = 0
        self._readers = 0
        self._progress = (self._loop.time(), 0)

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
        if self._readers or self._running is None or not self._running.running():
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
    def size(self) -> int:
        """Bytes; the right number once `started` has returned."""
        return self.download.size or 0

    async def started(self) -> None:
        """Wait until the size is known. Raises what ended the fill before that."""
        while self.download.state is State.STARTING and not self.done:
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
        self._waiting += 1
        try:
            await self._changed.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and self._running is not None:
                # No client and no background worker waits any more. A download that has its
                # thread goes on; one that waits for a thread is dropped.
                self._running.cancel()
        if self.error is not None:
            raise self.error.with_traceback(None)


class Fills:
    """Owns the threads and tasks of all fills; `close` ends them."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        limits = self._limits = config.fetch
        is_listed = config.upstreams.__contains__
        self._running: dict[_Key, Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = UpstreamThreads(
            "fills", share=limits.fills, queue=limits.queue, is_listed=is_listed
        )
        # For further connections of a download: on average one for each fill.
        self._helpers = UpstreamThreads(
            "helpers", share=limits.fills, queue=limits.queue, is_listed=is_listed
        )
        self._queues: dict[str, deque[tuple[Callable[[], Fill | None], _Key]]] = {}
        self._queued: set[_Key] = set()
        self._workers: Counter[str] = Counter()
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        self._ended_bytes = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that upstreams have sent for all fills, running and ended."""
        running = sum(fill.download.bytes_fetched for fill in self._running.values())
        return self._ended_bytes + running

    def running(self, digest: Digest, partition: str) -> Fill | None:
        return self._running.get((partition, digest))

    def check_room(self, registry: str) -> None:
        """Raises Busy where as many fills wait as may. Background fills do not ask:
        `background_fills` bounds them."""
        self._threads.check_room(registry)

    def start(
        self,
        repository: Repository,
        digest: Digest,
        *,
        partition: str,
        backend: Backend,
        size: int | None,
        check: Callable[[], None],
        ended: Callable[[OciProxyError | None], None],
    ) -> Fill:
        """The fill of this digest in this partition (`Config.partition`): the one that runs, else a
        new one. A new one that waits long for a thread calls `check` in it, and ends with what that
        raises. `ended` is told what the upstream's answer to a new one was."""
        fill = self.running(digest, partition)
        if fill is None:
            fill = self._launch(
                repository, digest, partition, backend, size, check, ended, again=True
            )
        return fill

    def queue(
        self,
        registry: str,
        descriptor: Descriptor,
        partition: str,
        start: Callable[[], Fill | None],
    ) -> None:
        """Fetch this blob in the background, when it is its turn among those of this registry.
        `start` begins it, and returns None where it is stored by then."""
        key = (partition, descriptor.digest)
        if (
            self._closed
            or self._limits.background_fills == 0
            or key in self._queued
            or key in self._running
            or len(self._queued) >= _BACKGROUND_QUEUE
        ):
            return
        self._queues.setdefault(registry, deque()).append((start, key))
        self._queued.add(key)
        if self._workers[registry] < self._limits.background_fills:
            self._workers[registry] += 1
            self._own(asyncio.create_task(self._work_queue(registry)))

    async def drain(self) -> None:
        """Drop the queue; return when the running fills have ended."""
        self._drop_queues()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End every fill soon, keeping what arrived. Return when their tasks have ended, after
        `fetch.timeouts.stall` at the latest."""
        self._closed = True
        self._drop_queues()
        if self._watcher is not None:
            self._watcher.cancel()
        for fill in list(self._running.values()):
            fill.download.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.timeouts.stall)
        self._threads.shutdown()
        self._helpers.shutdown()

    def _launch(
        self,
        repository: Repository,
        digest: Digest,
        partition: str,
        backend: Backend,
        size: int | None,
        check: Callable[[], None],
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
            notify=lambda: fill.notify(),
            spawn=partial(self._helpers.submit, repository.registry),
        )
        fill = Fill(download, repository)
        if self._closed:
            fill.end(UpstreamUnavailable(repository.registry, "shutting down"))
            return fill

        fetch = partial(backend.fetch_blob, repository, digest, tries=self._limits.retries)
        asked = time.monotonic()

        def work() -> None:
            if time.monotonic() - asked > _LONG_WAIT:
                try:
                    check()
                except OciProxyError:
                    download.abort()  # the upstream has not been asked: this is no answer of it
                    raise
            download.run(fetch)

        running = self._threads.submit(repository.registry, work)
        fill.use_thread(running)

        async def run() -> None:
            error: Exception | None = None
            try:
                await asyncio.wrap_future(running)
                ended(None)
            except OciProxyError as exc:
                error = exc
                if not (download.stopped.is_set() or (again and isinstance(exc, IntegrityError))):
                    ended(exc)
                log.event(logging.WARNING, "fill failed", digest=digest, reason=exc)
            except Exception as exc:  # noqa: BLE001 a task's end: reported, and passed to every reader
                error = exc
                log.failure("fill failed", exc, digest=digest)
            except asyncio.CancelledError:
                if not running.cancelled():
                    # The process ends. The thread may go on for a moment: its file stays open.
                    fill.abandon(UpstreamUnavailable(repository.registry, "shutting down"))
                    raise
                error = UpstreamUnavailable(repository.registry, "no client waits for it any more")
            finally:
                del self._running[partition, digest]
                self._ended_bytes += download.bytes_fetched
            fill.end(error)
            if isinstance(error, IntegrityError) and again:
                # The bytes may have been damaged on their way, or follow a stale beginning: fetch
                # the blob once more, from zero.
                self._launch(
                    repository, digest, partition, backend, size, check, ended, again=False
                )

        self._running[partition, digest] = fill
        self._own(asyncio.create_task(run()))
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        return fill

    async def _watch(self) -> None:
        """Free the threads of fills that no client reads and that hardly move. What arrived stays
        for the next client."""
        seconds, rate = self._limits.unread, self._limits.min_rate
        while self._running and not self._closed:
            await asyncio.sleep(_WATCH_INTERVAL)
            for fill in list(self._running.values()):
                if fill.is_idle(seconds, rate):
                    log.event(
                        logging.INFO,
                        "fill given up",
                        digest=fill.digest,
                        upstream=fill.repository.registry,
                        bytes=fill.download.bytes_fetched,
                        reason=f"no client reads it, and it is slower than {rate} bytes a second",
                    )
                    fill.download.abort()

    async def _work_queue(self, registry: str) -> None:
        try:
            while (queue := self._queues.get(registry)) and not self._closed:
                start, key = queue.popleft()
                self._queued.discard(key)
                try:
                    fill = start()
                    if fill is not None:
                        await fill.finished()
                except OciProxyError:
                    continue  # logged where it happened
        finally:
            self._workers[registry] -= 1
            if not self._workers[registry]:
                del self._workers[registry]
                self._queues.pop(registry, None)

    def _drop_queues(self) -> None:
        self._queues.clear()
        self._queued.clear()

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
