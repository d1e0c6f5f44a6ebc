"""A client got a manifest under this name that the store had from another repository: this module
records it. Without the record an offline server would lack its referrers, and `list` and `export`
would lack the image.

A client that asks by digest may have made the name up. Such a name is recorded once the upstream
says that it has the manifest: else a client could fill the disk with records of one manifest.

Tests: tests/serve/test_manifests.py, tests/serve/test_failing_store.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import OciProxyError, StoreError
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ociproxy.clock import Clock
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_MOST: Final = 1024
"""Hits of each kind that wait to be recorded; one more is recorded when a client asks again."""
_FLUSH_LIMIT: Final = 1.0
"""Seconds that the records which wait may take at the end."""


class HitRecords:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        threads: StoreThreads,
        resolve: Callable[[Reference], Awaitable[Descriptor]],
        clock: Clock,
        pause: float,
    ) -> None:
        """`resolve` asks the upstream. `pause` is in seconds: so long nothing is recorded where the
        store kept nothing."""
        self._store = store
        self._threads = threads
        self._resolve = resolve
        self._clock = clock
        self._pause = pause
        self._waiting: dict[tuple[Repository, Digest], Descriptor] = {}
        self._doubtful: dict[tuple[Repository, Digest], Descriptor] = {}
        self._task: asyncio.Task[None] | None = None
        self._again = 0.0

    def record(self, repository: Repository, descriptor: Descriptor, *, ask: bool) -> None:
        """Soon, and in a thread; with `ask` if the upstream says that the repository has it."""
        waiting = self._doubtful if ask else self._waiting
        if (
            self._store.refs.remembers(repository, descriptor.digest)
            or len(waiting) >= _MOST
            or self._clock.monotonic() < self._again
        ):
            return
        waiting[repository, descriptor.digest] = descriptor
        if self._task is None or self._task.done():
            # Not in the client's context, whose deadline would end the requests of later hits.
            self._task = asyncio.create_task(self._run(), context=Context())

    async def drain(self) -> None:
        """Return when no hit waits."""
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_FLUSH_LIMIT)
            self._task.cancel()  # one that has ended takes no harm

    async def _run(self) -> None:
        while self._waiting or self._doubtful:
            hits, self._waiting = self._waiting, {}
            hits = hits or await self._confirmed()
            try:
                await self._threads.run(partial(self._write, hits))
            except StoreError as exc:
                # A read-only store, or a full one: what is served is good all the same.
                self._again = self._clock.monotonic() + self._pause
                log.event(logging.DEBUG, "hit not recorded", reason=exc)

    async def _confirmed(self) -> dict[tuple[Repository, Digest], Descriptor]:
        """The oldest doubtful hit, if its upstream has it. One after the other: names that clients
        make up take one thread at most."""
        repository, digest = hit = next(iter(self._doubtful))
        descriptor = self._doubtful.pop(hit)
        reference = Reference(repository, digest=digest)
        try:
            found = await self._resolve(reference)
        except OciProxyError as exc:
            log.event(logging.DEBUG, "hit not recorded", reference=reference, reason=exc)
            return {}
        return {hit: descriptor} if found.digest == digest else {}

    def _write(self, hits: dict[tuple[Repository, Digest], Descriptor]) -> None:
        for (repository, _), descriptor in hits.items():
            self._store.record_manifest(repository, descriptor)
