"""Manifests, pulled through: what is stored and fresh, else what the upstream says, else what is
stored.

A tag has a time to live. After it one HEAD asks whether it moved, and only if it did is the
manifest fetched; an upstream that fails, refuses or dawdles leaves the client with what is stored.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import SystemClock
from ociproxy.errors import DigestMismatch, ManifestUnknown, OciProxyError
from ociproxy.fetch.cache_status import (
    HIT,
    MISS,
    MISS_COLLAPSED,
    PASSED_ON,
    PAUSED,
    REVALIDATED,
    SLOW,
    UPDATED,
    CacheStatus,
    stale_because,
)
from ociproxy.oci.reference import Reference
from ociproxy.store.manifests import with_media_type
from ociproxy.store.read_only import TagRecord

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.blobs import BlobPuller
    from ociproxy.fetch.isolation import Isolation
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_PAUSES: Final = 10_000


class ManifestAnswer(NamedTuple):
    """`raw` is None where only the head was asked for and the bytes are not stored."""

    descriptor: Descriptor
    raw: bytes | None
    status: CacheStatus


class ManifestPuller:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        threads: StoreThreads,
        blobs: BlobPuller,
        isolation: Isolation,
        config: Config,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._threads = threads
        self._blobs = blobs
        self._isolation = isolation
        self._config = config
        self._clock = clock or SystemClock()
        self._paused: BoundedCache[Reference, float] = BoundedCache(_PAUSES)
        self._ttls: BoundedCache[Reference, float] = BoundedCache(_PAUSES)
        self._tasks: set[asyncio.Task[tuple[ManifestHolder, CacheStatus]]] = set()

    def find(self, reference: Reference, *, body: bool) -> ManifestAnswer | None:
        """What `pull` answers where it need not wait: stored and fresh. Else None.

        Raises StoreError.
        """
        record, stored = self._look_up(reference)
        if stored is None or self._has_expired(reference, record):
            return None
        return self._answer(reference.repository, stored, HIT, body=body)

    async def pull(self, reference: Reference, *, body: bool) -> ManifestAnswer:
        """The manifest of a tag or digest; with `body` False its descriptor is enough.

        Raises ManifestUnknown, NameUnknown, UpstreamError kinds, IntegrityError kinds or
        StoreError.
        """
        record, stored = self._look_up(reference)
        expired = self._has_expired(reference, record)
        if stored is not None:
            if expired:
                return await self._revalidate(reference, stored, body=body)
            return self._answer(reference.repository, stored, HIT, body=body)
        if record is not None and not expired:
            return await self._unstored(reference, record, body=body)
        return await self._from_upstream(reference, body=body)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look_up(self, reference: Reference) -> tuple[TagRecord | None, ManifestHolder | None]:
        """The tag's record, and the stored manifest under the media type it is recorded with, if
        this repository may be served it."""
        repository, digest = reference.repository, reference.digest
        if digest is None:
            record = self._store.refs.find_tag(repository, reference.tag or "")
            if record is None:
                return None, None
            digest = record.descriptor.digest
            found = self._store.manifests.find(digest)
            if found is None or not self._isolation.has_manifest(repository, digest):
                return record, None
            return record, with_media_type(found, record.descriptor)
        found = self._store.manifests.find(digest)
        if found is None or not self._isolation.has_manifest(repository, digest):
            return None, None
        return None, with_media_type(found, self._store.refs.find_manifest(repository, digest))

    def _has_expired(self, reference: Reference, record: TagRecord | None) -> bool:
        """Only what a tag stands for can; a digest is for ever."""
        if record is None or self._upstreams.offline:
            return False
        ttl = self._ttls.get(reference)
        if ttl is None:
            configured = self._config.tag_ttl(reference)
            ttl = float("inf") if configured is None else configured
            self._ttls.put(reference, ttl)
        # A record from a clock ahead of ours is not fresh for longer than the time to live.
        return abs(self._clock.now() - record.resolved) >= ttl

    async def _from_upstream(self, reference: Reference, *, body: bool) -> ManifestAnswer:
        if not body:
            return ManifestAnswer(await self._resolve(reference), None, PASSED_ON)
        status = MISS_COLLAPSED if self._requests.is_running(_fetching(reference)) else MISS
        holder = await self._fetch(reference)
        return self._answer(reference.repository, holder, status, body=body)

    async def _unstored(
        self, reference: Reference, record: TagRecord, *, body: bool
    ) -> ManifestAnswer:
        """The tag is known, for somebody asked for its head; the manifest is not here yet."""
        if not body:
            return ManifestAnswer(record.descriptor, None, HIT)
        by_digest = Reference(reference.repository, digest=record.descriptor.digest)
        try:
            return await self.pull(by_digest, body=True)
        except (ManifestUnknown, DigestMismatch):
            # The tag has moved since, or the head named a digest that was never right.
            return await self._from_upstream(reference, body=True)

    async def _revalidate(
        self, reference: Reference, stored: ManifestHolder, *, body: bool
    ) -> ManifestAnswer:
        """The tag has expired: ask, but do not let the client wait for long, nor for nothing."""
        repository = reference.repository
        if (self._paused.get(reference) or 0) > self._clock.monotonic():
            return self._answer(repository, stored, PAUSED, body=body)
        asking = asyncio.create_task(self._refresh(reference, stored))
        self._own(asking)
        try:
            async with asyncio.timeout(self._config.fetch.timeouts.revalidate):
                holder, status = await asyncio.shield(asking)
        except TimeoutError:
            status = self._serve_stale(reference, SLOW, "no answer in time")
            return self._answer(repository, stored, status, body=body)
        except OciProxyError as exc:
            status = self._serve_stale(reference, stale_because(exc), exc)
            return self._answer(repository, stored, status, body=body)
        return self._answer(repository, holder, status, body=body)

    async def _refresh(
        self, reference: Reference, stored: ManifestHolder
    ) -> tuple[ManifestHolder, CacheStatus]:
        descriptor = await self._resolve(reference, stored.descriptor)
        status = REVALIDATED
        if descriptor.digest != stored.descriptor.digest:
            # The tag moves once the new manifest is here: until then the old one can be served.
            stored = await self._fetch(Reference(reference.repository, digest=descriptor.digest))
            await self._threads.run(lambda: self._record(reference, stored.descriptor))
            status = UPDATED
        self._paused.drop(reference)
        return stored, status

    def _serve_stale(
        self, reference: Reference, status: CacheStatus, reason: object
    ) -> CacheStatus:
        pause = self._config.fetch.pause
        self._paused.put(reference, self._clock.monotonic() + pause)
        log.event(logging.WARNING, "serving stale", reference=reference, reason=reason, pause=pause)
        return status

    def _answer(
        self, repository: Repository, holder: ManifestHolder, status: CacheStatus, *, body: bool
    ) -> ManifestAnswer:
        if body and holder.descriptor.is_image:
            self._blobs.prefetch(repository, holder)
        return ManifestAnswer(holder.descriptor, holder.raw, status)

    async def _resolve(self, reference: Reference, stored: Descriptor | None = None) -> Descriptor:
        """HEAD at the upstream; records what the tag is, unless it moved from what is stored."""

        def question(backend: Backend) -> Descriptor:
            descriptor = backend.resolve(reference)
            if stored is None or stored.digest == descriptor.digest:
                self._record(reference, stored or descriptor)
            return descriptor

        self._upstreams.check_online(ManifestUnknown, reference)
        return await self._requests.call(reference.repository, ("resolve", reference), question)

    async def _fetch(self, reference: Reference) -> ManifestHolder:
        """GET at the upstream, into the store; by tag, the tag's record last."""

        def question(backend: Backend) -> ManifestHolder:
            holder = backend.fetch_manifest(reference)
            self._store.commit_manifest(reference.repository, holder)
            self._record(reference, holder.descriptor)
            return holder

        self._upstreams.check_online(ManifestUnknown, reference)
        return await self._requests.call(reference.repository, _fetching(reference), question)

    def _record(self, reference: Reference, descriptor: Descriptor) -> None:
        if reference.tag is None:
            return
        self._store.record_tag(
            reference.repository, reference.tag, descriptor, now=self._clock.now()
        )

    def _own(self, task: asyncio.Task[tuple[ManifestHolder, CacheStatus]]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[tuple[ManifestHolder, CacheStatus]]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the client was told, or had its answer before


def _fetching(reference: Reference) -> tuple[str, Reference]:
    return "manifest", reference
