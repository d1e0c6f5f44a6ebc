"""Fetching ahead: the blobs of an image that a client pulls, before the client asks for them.

They wait for their turn among those of their registry: `fetch.background_fills` at once.

Tests: tests/serve/test_blobs.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.errors import OciProxyError, StoreError
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import parse_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Config
    from ociproxy.fetch.blobs import BlobPuller
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_BLOBS_AHEAD: Final = 1024
"""Blobs of one image that are fetched before a client asks; no honest image has as many."""
_LACKING: Final = 65_536
"""Blobs kept of all images together that the store lacked when their image was looked through; an
image weighs one more."""
_LOOKS_AHEAD: Final = 64
"""Images that are looked through at once, or wait for it; each keeps its manifest in memory."""
_SHORT: Final = 16 * 1024
"""Bytes of a manifest that the event loop looks through: about a hundred blobs, a millisecond."""
_BATCH: Final = 64
"""Blobs that are queued before other tasks have their turn."""
_QUEUE: Final = 10_000
"""Blobs that may wait for a background fill. Further ones are fetched when a client asks."""

_Key = tuple[str, "Digest"]


class LookAhead:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        threads: StoreThreads,
        blobs: BlobPuller,
        config: Config,
        *,
        offline: bool,
    ) -> None:
        self.queued: set[_Key] = set()
        """The blobs that wait for their turn, by partition (`Config.partition`) and digest."""
        self._store = store
        self._threads = threads
        self._blobs = blobs
        self._partition = config.partition
        self._most = config.fetch.background_fills
        self._offline = offline
        self._queues: dict[str, deque[tuple[Repository, Descriptor, _Key]]] = {}
        self._workers: Counter[str] = Counter()
        self._working: set[asyncio.Task[None]] = set()
        self._successor: LookAhead | None = None
        self._lacking: BoundedCache[Digest, tuple[Descriptor, ...]] = BoundedCache(_LACKING)
        self._looking: dict[Digest, asyncio.Task[None]] = {}

    def prefetch(self, repository: Repository, image: ManifestHolder) -> None:
        """Fetch in the background the blobs that the store lacks of an image a client pulls.

        A thread looks through a long manifest, and through any where each look may hang. Of a short
        one the sizes of its blobs are known when the client asks for one: a page in the place of a
        blob is told by its size. A manifest is looked through once while it is remembered: later
        only for the blobs that were lacking. One that has gone from the store since is fetched when
        a client asks.
        """
        digest = image.descriptor.digest
        if (
            self._lacking.get(digest) == ()
            or digest in self._looking
            or len(self._looking) >= _LOOKS_AHEAD
            or self._offline
        ):
            return
        if len(image.raw) <= _SHORT and not self._threads.is_remote:
            with self._logged(digest):
                for blob in self._remember(digest, self._look(image)):
                    self.queue(repository, blob)
            return
        looking = asyncio.create_task(self._look_ahead(repository, image))
        self._looking[digest] = looking
        looking.add_done_callback(lambda _: self._looking.pop(digest))

    async def _look_ahead(self, repository: Repository, image: ManifestHolder) -> None:
        digest = image.descriptor.digest
        with self._logged(digest):
            lacking = self._remember(digest, await self._threads.run(partial(self._look, image)))
            for first in range(0, len(lacking), _BATCH):
                for blob in lacking[first : first + _BATCH]:
                    self.queue(repository, blob)
                await asyncio.sleep(0)

    def _look(self, image: ManifestHolder) -> tuple[Descriptor, ...]:
        return _lacking_of(self._store, image, self._lacking.get(image.descriptor.digest))

    def _remember(self, digest: Digest, lacking: tuple[Descriptor, ...]) -> tuple[Descriptor, ...]:
        self._lacking.put(digest, lacking, len(lacking) + 1)
        return lacking

    @contextmanager
    def _logged(self, digest: Digest) -> Iterator[None]:
        try:
            yield
        except StoreError as exc:
            log.event(logging.WARNING, "not fetched ahead", digest=digest, reason=exc)

    def queue(self, repository: Repository, blob: Descriptor) -> None:
        """Fetch a blob when it is its turn, unless it is stored by then."""
        if self._successor is not None:
            self._successor.queue(repository, blob)
            return
        self._blobs.expect(repository, blob)
        registry = repository.registry
        key = (self._partition(registry), blob.digest)
        if (
            self._most == 0
            or key in self.queued
            or self._blobs.running(repository, blob.digest) is not None
            or len(self.queued) >= _QUEUE
        ):
            return
        self._queues.setdefault(registry, deque()).append((repository, blob, key))
        self.queued.add(key)
        if self._workers[registry] < self._most:
            self._workers[registry] += 1
            working = asyncio.create_task(self._work(registry))
            self._working.add(working)
            working.add_done_callback(self._working.discard)

    async def _work(self, registry: str) -> None:
        try:
            while queue := self._queues.get(registry):
                repository, blob, key = queue.popleft()
                self.queued.discard(key)
                try:
                    fill = self._blobs.start_missing(repository, blob)
                    if fill is not None:
                        await fill.finished()
                except OciProxyError:
                    continue  # logged where it happened
        finally:
            self._workers[registry] -= 1
            if not self._workers[registry]:
                del self._workers[registry]
                self._queues.pop(registry, None)

    def hand_over(self, successor: LookAhead) -> None:
        """From now on `successor` fetches ahead, beginning with what waits here for its turn."""
        self._successor = successor
        waiting = [each for queue in self._queues.values() for each in queue]
        self._drop_queues()
        for repository, blob, _ in waiting:
            successor.queue(repository, blob)

    def _drop_queues(self) -> None:
        self._queues.clear()
        self.queued.clear()

    async def drain(self) -> None:
        """Return when no image is being looked through, and no blob waits for its turn or is
        fetched ahead."""
        while running := {*self._looking.values(), *self._working}:
            await asyncio.wait(running)

    async def close(self) -> None:
        self._most = 0
        self._drop_queues()
        running = [*self._looking.values(), *self._working]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _lacking_of(
    store: Store, image: ManifestHolder, known: tuple[Descriptor, ...] | None
) -> tuple[Descriptor, ...]:
    """The blobs of an image that are not stored, `_BLOBS_AHEAD` at most: of the `known` ones, if it
    was looked through before. Blocks. Raises StoreError."""
    if known is None:
        try:
            # Not `image.manifest`: the hot copy would keep the parsed document beyond its weight.
            manifest = image.parsed or parse_manifest(image.raw, image.descriptor.media_type)
        except MalformedManifest:
            return ()  # the tag's record has a wrong media type; the bytes are served all the same
        known = manifest.blobs
    lacking = (blob for blob in known if store.blobs.find_size(blob.digest) is None)
    return tuple(islice(lacking, _BLOBS_AHEAD))
