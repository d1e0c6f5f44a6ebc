"""The running fills.

At most one download runs per digest and partition, whichever repository it is asked for.

Tests: tests/fetch/download/test_fill.py, tests/serve/test_fills.py, tests/serve/test_neighbours.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import Busy, IntegrityError, Interrupted, OciProxyError, StoreFull
from ociproxy.fetch.download.download import Download
from ociproxy.fetch.download.fill import Fill
from ociproxy.fetch.download.relay import PassingIngest, Relay
from ociproxy.fetch.upstreams.threads import UpstreamThreads
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Backend
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.room import Room
    from ociproxy.store.store import Store

_Key = tuple[str, "Digest"]

_RELAYS: Final = 16
"""Blobs that may pass through memory at the same time, each with a window of its own."""
_LONG_WAIT: Final = 1.0
"""Seconds after which a fill that waited for a thread asks anew whether its upstream may be asked:
the breaker may have opened."""
_WATCH_INTERVAL: Final = 1.0
"""Seconds between looks at fills without a reader."""


class Fills:
    """Owns the threads and tasks of all fills; `close` ends them."""

    def __init__(self, store: Store, config: Config, *, room: Room | None = None) -> None:
        """`room` says what fits the store; without it, that of the store does."""
        self._store = store
        self._room = room
        limits = self._limits = config.fetch
        is_listed = config.upstreams.__contains__
        self._running: dict[_Key, Fill] = {}
        self._relays: set[Relay] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = UpstreamThreads(
            "fills", share=limits.fills, queue=limits.queue, is_listed=is_listed
        )
        # For further connections of a download: on average one for each fill.
        self._helpers = UpstreamThreads(
            "helpers", share=limits.fills, queue=limits.queue, is_listed=is_listed
        )
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        self._ended_bytes = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that upstreams have sent for all fills, running and ended."""
        running = sum(fill.download.bytes_fetched for fill in self.under_way())
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
        ended: Callable[[OciProxyError | None, bool], None],
        again: bool = True,
    ) -> Fill:
        """The fill of this digest in this partition (`Config.partition`): the one that runs, else a
        new one. A new one that waits long for a thread calls `check` in it, and ends with what that
        raises. `ended` is told what a new one ended with, and whether the upstream has sent any of
        it to this process. With `again`, a blob whose bytes were wrong is fetched once more."""
        running = self.running(digest, partition)
        if running is not None:
            return running
        download = Download(
            repository,
            digest,
            self._store,
            self._limits,
            partition=partition,
            expected_size=size,
            believes=again,
            spawn=partial(self._helpers.submit, repository.registry),
            room=self._room,
        )
        fill = Fill(download)
        if self._closed:
            fill.end(Interrupted(repository.registry, "shutting down"))
            return fill

        asked = time.monotonic()

        def work() -> None:
            if time.monotonic() - asked > _LONG_WAIT:
                try:
                    check()
                except OciProxyError:
                    download.abort()  # the upstream has not been asked: this is no answer of it
                    raise
            download.run(backend.fetch_blob)

        future = self._threads.submit(repository.registry, work)
        fill.use_thread(future)

        async def run() -> None:
            try:
                error = await self._outcome(fill, future)
                if error is None:
                    ended(None, download.answered)
                elif isinstance(error, OciProxyError) and not (
                    future.cancelled()
                    or download.stopped.is_set()
                    or (again and isinstance(error, IntegrityError))
                ):
                    ended(error, download.answered)
            finally:
                del self._running[partition, digest]
                self._ended_bytes += download.bytes_fetched
            fill.end(error)
            if isinstance(error, IntegrityError) and again:
                # The bytes may have been damaged on their way, or follow a stale beginning: fetch
                # the blob once more, from zero, and without the claimed size, which may be wrong.
                self.start(
                    repository,
                    digest,
                    partition=partition,
                    backend=backend,
                    size=None,
                    check=check,
                    ended=ended,
                    again=False,
                )

        self._running[partition, digest] = fill
        self._begin(run())
        return fill

    def relay(self, repository: Repository, digest: Digest, *, backend: Backend) -> Relay:
        """Fetch the blob for one client, through memory. Raises Busy, or StoreError where there is
        no memory for it."""
        if self._closed:
            raise Interrupted(repository.registry, "shutting down")
        if len(self._relays) >= _RELAYS:
            raise Busy(f"{_RELAYS} blobs that the store cannot keep, and more may not pass")
        download = Download(
            repository,
            digest,
            self._store,
            self._limits,
            partition="",
            expected_size=None,
            believes=True,
            spawn=_no_helper,
        )
        with store_errors(Path("memory")):
            passing = PassingIngest(download)
        download.assembly.adopt(passing)
        fill = Relay(download, passing)
        future = self._threads.submit(repository.registry, lambda: download.run(backend.fetch_blob))
        fill.use_thread(future)

        async def run() -> None:
            try:
                error = await self._outcome(fill, future)
            finally:
                self._relays.discard(fill)
                self._ended_bytes += download.bytes_fetched
            fill.end(error)

        self._relays.add(fill)
        self._begin(run())
        return fill

    async def _outcome(self, fill: Fill, future: Future[None]) -> Exception | None:
        """What ended the download's thread, or its wait for one."""
        registry = fill.repository.registry
        try:
            await asyncio.wrap_future(future)
        except OciProxyError as exc:
            # Where the store has no room, the log says `passing through` for a client that waits.
            level = logging.DEBUG if isinstance(exc, StoreFull) else logging.WARNING
            log.event(level, "fill failed", digest=fill.digest, upstream=registry, reason=exc)
            return exc
        except Exception as exc:  # noqa: BLE001 a task's end: reported, and passed to every reader
            log.failure("fill failed", exc, digest=fill.digest, upstream=registry)
            return exc
        except asyncio.CancelledError:
            if not future.cancelled():
                # The process ends. The thread may go on for a moment: its file stays open.
                fill.abandon(Interrupted(registry, "shutting down"))
                raise
            return Interrupted(registry, "no client waits for it any more")
        return None

    def _begin(self, run: Coroutine[None, None, None]) -> None:
        self._own(asyncio.create_task(run))
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Return when the running fills have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End every fill soon, keeping what arrived. Return when their tasks have ended, after
        `fetch.timeouts.stall` at the latest."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        for fill in self.under_way():
            fill.download.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.timeouts.stall)
        self._threads.shutdown()
        self._helpers.shutdown()

    def under_way(self) -> list[Fill]:
        return [*self._running.values(), *self._relays]

    async def _watch(self) -> None:
        """Free the threads of fills that no client reads and that hardly move. What arrived stays
        for the next client."""
        seconds, rate = self._limits.unread, self._limits.min_rate
        while self.under_way() and not self._closed:
            await asyncio.sleep(_WATCH_INTERVAL)
            for fill in self.under_way():
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

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _no_helper(_: Callable[[], None]) -> Future[None]:
    """One connection brings the bytes in order, as a window of them needs it."""
    raise RuntimeError("no further connection")
