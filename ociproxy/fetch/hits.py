"""A client got a manifest under this name that the store had from another repository: this module
records it. Without the record an offline server would lack its referrers, and `list` and `export`
would lack the image.

Tests: tests/serve/test_manifests.py, tests/serve/test_failing_store.py.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import StoreError

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_MOST: Final = 1024
"""Hits that wait to be recorded; one more is recorded when a client asks again."""
_FLUSH_LIMIT: Final = 1.0
"""Seconds that the records which wait may take at the end."""


class HitRecords:
    """Belongs to one event loop."""

    def __init__(self, store: Store, threads: StoreThreads, clock: Clock, pause: float) -> None:
        """`pause` is in seconds: so long nothing is recorded where the store kept nothing."""
        self._store = store
        self._threads = threads
        self._clock = clock
        self._pause = pause
        self._waiting: dict[tuple[Repository, Digest], Descriptor] = {}
        self._task: asyncio.Task[None] | None = None
        self._again = 0.0

    def record(self, repository: Repository, descriptor: Descriptor) -> None:
        """Soon, and in a thread."""
        if (
            self._store.refs.remembers(repository, descriptor.digest)
            or len(self._waiting) >= _MOST
            or self._clock.monotonic() < self._again
        ):
            return
        self._waiting[repository, descriptor.digest] = descriptor
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def drain(self) -> None:
        """Return when no hit waits."""
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_FLUSH_LIMIT)
            self._task.cancel()  # one that has ended takes no harm

    async def _run(self) -> None:
        while self._waiting:
            hits, self._waiting = self._waiting, {}
            try:
                await self._threads.run(partial(self._write, hits))
            except StoreError as exc:
                # A read-only store, or a full one: what is served is good all the same.
                self._again = self._clock.monotonic() + self._pause
                log.event(logging.DEBUG, "hit not recorded", reason=exc)

    def _write(self, hits: dict[tuple[Repository, Digest], Descriptor]) -> None:
        for (repository, _), descriptor in hits.items():
            self._store.record_manifest(repository, descriptor)
