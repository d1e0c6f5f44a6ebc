"""The pull engine put together: what the server and the loader ask.

Tests: tests/serve/test_api.py, tests/load/test_loader.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.clock import SystemClock
from ociproxy.fetch.blobs import BlobPuller
from ociproxy.fetch.download.fill import Fills
from ociproxy.fetch.isolation import Isolation
from ociproxy.fetch.listings import ListingPuller
from ociproxy.fetch.manifests import ManifestPuller
from ociproxy.fetch.upstreams.requests import Requests
from ociproxy.fetch.upstreams.threads import StoreThreads
from ociproxy.fetch.upstreams.upstreams import Upstreams

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.store.store import Store

_ABANDONED_AFTER: Final = 24 * 3600.0
"""Seconds after which a download that no process resumed is removed from `pulls/`."""


class Engine:
    """Belongs to the event loop that it is made in; `close` when that ends."""

    def __init__(
        self,
        store: Store,
        config: Config,
        make_backend: MakeBackend,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.store = store
        self._clock = clock or SystemClock()
        self._fills = Fills(store, config)
        self.upstreams = Upstreams(config, make_backend, clock=clock)
        self.requests = Requests(self.upstreams, config, clock=clock)
        self.threads = StoreThreads(config.fetch.requests)
        isolation = (
            Isolation(store, self.upstreams, self.requests, self.threads)
            if config.isolated
            else None
        )
        self.blobs = BlobPuller(
            store, self.upstreams, self.requests, self.threads, self._fills, isolation, config
        )
        self.manifests = ManifestPuller(
            store,
            self.upstreams,
            self.requests,
            self.threads,
            self.blobs,
            isolation,
            config,
            clock=clock,
        )
        self.listings = ListingPuller(store, self.upstreams, self.requests, self.manifests)
        self._preparing = asyncio.create_task(self._prepare())

    async def close(self) -> None:
        """End what is running: downloads soon, keeping what arrived; requests without waiting."""
        self._preparing.cancel()
        await asyncio.gather(
            self._preparing, self.manifests.close(), self._fills.close(), return_exceptions=True
        )
        await self.requests.close()
        self.threads.close()
        self.upstreams.close()

    async def retire(self) -> None:
        """Another engine has taken over: finish the downloads that clients may be reading, then
        close."""
        await self._fills.drain()
        await self.close()

    async def _prepare(self) -> None:
        await self.threads.run(self.upstreams.prepare)
        before = self._clock.now() - _ABANDONED_AFTER
        removed = await self.threads.run(lambda: self.store.staging.sweep(before))
        if removed:
            log.event(logging.INFO, "abandoned downloads removed", files=removed)
