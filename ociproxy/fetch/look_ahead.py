"""Fetching ahead: the blobs of an image that a client pulls, before the client asks for them.

Tests: tests/serve/test_blobs.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


class LookAhead:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        threads: StoreThreads,
        fetch: Callable[[Repository, Descriptor], None],
        *,
        offline: bool,
    ) -> None:
        """`fetch` begins to fetch a blob in the background."""
        self._store = store
        self._threads = threads
        self._fetch = fetch
        self._offline = offline
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
                    self._fetch(repository, blob)
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
                    self._fetch(repository, blob)
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

    async def drain(self) -> None:
        """Return when no image is being looked through."""
        while self._looking:
            await asyncio.wait(self._looking.values())

    async def close(self) -> None:
        for looking in self._looking.values():
            looking.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)


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
