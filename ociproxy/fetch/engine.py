"""The pull engine put together: what the server and the loader ask.

Tests: tests/serve/test_api.py, tests/load/test_loader.py.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.clock import SystemClock
from ociproxy.errors import StoreError
from ociproxy.fetch.blobs import BlobPuller
from ociproxy.fetch.download.fills import Fills
from ociproxy.fetch.isolation import Isolation
from ociproxy.fetch.listings import ListingPuller
from ociproxy.fetch.look_ahead import LookAhead
from ociproxy.fetch.manifests import ManifestPuller
from ociproxy.fetch.upstreams.requests import Requests
from ociproxy.fetch.upstreams.threads import StoreThreads
from ociproxy.fetch.upstreams.upstreams import Upstreams

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.store.room import Room
    from ociproxy.store.store import Store

_ABANDONED_AFTER: Final = 24 * 3600.0
"""Seconds after which a download that no process resumed is removed from `pulls/`."""

_SWEEP_INTERVAL: Final = 3600.0
"""Seconds between two looks at `pulls/` for such downloads."""
_VERIFICATIONS: Final = 4
"""Stored blobs that are hashed at once before they are served: further ones wait, and nothing else
waits for them."""

_SETTLE: Final = 5.0
"""Seconds that the disk may take at the end for what was taken in last."""


class Engine:
    """Belongs to the event loop that it is made in; `close` when that ends."""

    def __init__(
        self,
        store: Store,
        config: Config,
        make_backend: MakeBackend,
        *,
        room: Room | None = None,
        clock: Clock | None = None,
        sweep_interval: float = _SWEEP_INTERVAL,
    ) -> None:
        """`room` is that of `Fills`."""
        self.store = store
        self._sweep_interval = sweep_interval
        self._clock = clock or SystemClock()
        self.room = room or store.room
        self.fills = Fills(store, config, room=self.room)
        self.upstreams = Upstreams(config, make_backend, clock=clock)
        self.requests = Requests(self.upstreams, config, clock=clock)
        self.threads = StoreThreads(config.fetch.requests, is_remote=store.is_remote)
        self._verifiers = StoreThreads(_VERIFICATIONS, "verify")
        isolation = (
            Isolation(store, self.upstreams, self.requests, self.threads, self._verifiers)
            if config.isolated
            else None
        )
        self.blobs = BlobPuller(
            store,
            self.upstreams,
            self.requests,
            self.threads,
            self._verifiers,
            self.fills,
            isolation,
            config,
        )
        self.ahead = LookAhead(
            store, self.threads, self.blobs, config, offline=self.upstreams.offline
        )
        self.manifests = ManifestPuller(
            store,
            self.upstreams,
            self.requests,
            self.threads,
            self.ahead,
            isolation,
            config,
            clock=clock,
        )
        self.listings = ListingPuller(
            store, self.upstreams, self.requests, self.manifests, self.threads
        )
        self._preparing = asyncio.create_task(self._prepare())
        self._watching = asyncio.create_task(self.threads.watch(store.look))

    async def close(self) -> None:
        """End what is running: downloads soon, keeping what arrived; requests without waiting."""
        self._preparing.cancel()
        self._watching.cancel()
        await asyncio.gather(
            self._preparing,
            self._watching,
            self.manifests.close(),
            self.ahead.close(),
            self.fills.close(),
            return_exceptions=True,
        )
        self.requests.close()
        await self._settle()
        self.threads.close()
        self._verifiers.close()
        self.upstreams.close()

    async def _settle(self) -> None:
        """Have on the disk what was taken in last."""
        try:
            # The threads may all hang on the disk.
            async with asyncio.timeout(_SETTLE + 1):
                settled = await self.threads.run(partial(self.store.commits.settle, _SETTLE))
        except TimeoutError:
            settled = False
        if not settled:
            log.event(logging.WARNING, "not flushed to the disk", seconds=_SETTLE)

    def hand_over(self, successor: Engine) -> None:
        """Begin nothing more in the background: `successor` does, also what waits for its turn.
        Requests are answered as before."""
        self._preparing.cancel()
        self.ahead.hand_over(successor.ahead)

    async def drain(self) -> None:
        """Return when the requests to upstreams and the downloads that are running have ended."""
        await self.manifests.drain()
        await self.requests.drain()
        await self.ahead.drain()
        await self.fills.drain()

    async def _prepare(self) -> None:
        await self.threads.run(self.upstreams.prepare)
        while True:
            before = self._clock.now() - _ABANDONED_AFTER
            try:
                removed = await self.threads.run(partial(self.store.staging.sweep, before))
            except StoreError as exc:
                log.event(logging.WARNING, "abandoned downloads not removed", reason=exc)
            else:
                if removed:
                    log.event(logging.INFO, "abandoned downloads removed", files=removed)
            await asyncio.sleep(self._sweep_interval)
