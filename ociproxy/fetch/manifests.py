"""Manifests, pulled through: the stored one while it is fresh, else the upstream's, else the stored
one although it has expired.

A tag has a time to live. After it one HEAD asks the upstream whether the tag moved; the manifest is
fetched only if it did. Where the upstream fails, refuses or is slow, the stored manifest is served.

Tests: tests/serve/test_manifests.py, tests/serve/test_answer_time.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import SystemClock
from ociproxy.errors import DigestMismatch, ManifestUnknown, OciProxyError, StoreError
from ociproxy.fetch.cache_status import (
    HIT,
    MISS,
    MISS_COLLAPSED,
    PASSED_ON,
    PASSED_THROUGH,
    PAUSED,
    REVALIDATED,
    SLOW,
    UPDATED,
    CacheStatus,
    stale_because,
)
from ociproxy.fetch.hits import HitRecords
from ociproxy.fetch.upstreams.threads import take_error
from ociproxy.oci.reference import Reference
from ociproxy.store.manifests import with_media_type
from ociproxy.store.refs import TagRecord

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.isolation import Isolation
    from ociproxy.fetch.look_ahead import LookAhead
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.group_commit import Commit
    from ociproxy.store.store import Store

_TAGS: Final = 10_000
"""Tags whose pause and whose time to live are kept in memory."""
_DISK_WAIT: Final = 2.0
"""Seconds to wait for a disk that is behind, before a client gets a manifest that is not kept."""


class ManifestAnswer(NamedTuple):
    """`raw` is None for a HEAD of a manifest that is not stored."""

    descriptor: Descriptor
    raw: bytes | None
    status: CacheStatus


class _Found(NamedTuple):
    """In the store: a tag's record; the manifest, under its media type for the repository, where
    that may have it; and whether the repository is known to have it."""

    record: TagRecord | None
    stored: ManifestHolder | None
    recorded: bool

    def __bool__(self) -> bool:
        return self.record is not None or self.stored is not None


class _Fetched(NamedTuple):
    """From the upstream, and whether the store could keep it: the client gets it all the same."""

    holder: ManifestHolder
    kept: bool


class ManifestPuller:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        threads: StoreThreads,
        ahead: LookAhead,
        isolation: Isolation | None,
        config: Config,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._threads = threads
        self._ahead = ahead
        self._isolation = isolation
        self._config = config
        self._clock = clock or SystemClock()
        self._paused: BoundedCache[Reference, float] = BoundedCache(_TAGS)
        self._ttls: BoundedCache[Reference, float] = BoundedCache(_TAGS)
        self._tasks: set[asyncio.Task[tuple[ManifestHolder, CacheStatus]]] = set()
        self._hits = HitRecords(store, threads, self._resolve, self._clock, config.fetch.pause)

    async def pull(self, reference: Reference, *, body: bool) -> ManifestAnswer:
        """The manifest of a tag or digest; with `body` False its descriptor is enough.

        What is in memory and fresh is answered without a task switch, all else within
        `fetch.timeouts.answer`. A store that cannot be read, or hangs, is passed by. Raises Busy,
        ManifestUnknown, NameUnknown, UpstreamError or IntegrityError kinds; StoreError if offline.
        """
        try:
            return await self._pull(reference, body=body)
        except StoreError as exc:
            if self._upstreams.offline:
                raise
            log.event(logging.WARNING, "passing through", reference=reference, reason=exc)
            async with self._upstreams.answer_time(reference.repository.registry):
                return await self._from_upstream(reference, body=body)

    async def _pull(self, reference: Reference, *, body: bool) -> ManifestAnswer:
        repository = reference.repository
        found: _Found | _Fetched | None = None
        if self._threads.hung is None:
            if self._store.remembers(reference):
                found = self._look(reference)
            elif body:
                key, fetch = _fetching(reference), partial(self._take_in, reference)
                found = await self._requests.call_after(
                    repository, key, lambda: self._look(reference) or None, fetch
                )
        if isinstance(found, _Fetched):
            return self._fetched(reference, found, MISS)
        if found is None:
            found = await self._threads.look(partial(self._look, reference))
        record, stored, recorded = found
        expired = self._has_expired(reference, record)
        if stored is not None and not expired:
            told = record is not None  # by the upstream, that the tag means this
            return self._answer(repository, stored, HIT, body=body, recorded=recorded, told=told)
        async with self._upstreams.answer_time(repository.registry):
            if stored is not None:
                return await self._revalidate(reference, stored, body=body)
            if record is not None and not expired:
                return await self._unstored(reference, record, body=body)
            return await self._from_upstream(reference, body=body)

    def find_stored(self, reference: Reference) -> ManifestHolder | None:
        """What is stored for this repository, fresh or not. Blocks. Raises StoreError."""
        return self._look(reference).stored

    async def drain(self) -> None:
        """Return when what no client waits for any more has ended: the checks of expired tags, and
        the records of hits."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._hits.drain()

    async def close(self) -> None:
        await self._hits.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self, reference: Reference) -> _Found:
        record, digest = None, reference.digest
        if digest is None:
            record = self._store.refs.find_tag(reference.repository, reference.tag or "")
            digest = None if record is None else record.descriptor.digest
        found = None if digest is None else self._store.manifests.find(digest)
        if digest is None or found is None:
            return _Found(record, None, False)
        own: Descriptor | None = None
        if record is None or self._isolation is not None:
            own = self._store.refs.find_manifest(reference.repository, digest)
        if self._isolation is not None and own is None:
            return _Found(record, None, False)
        named = record.descriptor if record else own
        return _Found(record, with_media_type(found, named), own is not None)

    def _has_expired(self, reference: Reference, record: TagRecord | None) -> bool:
        """Whether a tag's time to live is over. A digest has no record and never expires."""
        if record is None or self._upstreams.offline:
            return False
        ttl = self._ttls.get(reference)
        if ttl is None:
            configured = self._config.tag_ttl(reference)
            ttl = float("inf") if configured is None else configured
            self._ttls.put(reference, ttl)
        # abs: a record from a clock that is ahead must not stay fresh for longer.
        return abs(self._clock.now() - record.resolved) >= ttl

    async def _from_upstream(self, reference: Reference, *, body: bool) -> ManifestAnswer:
        if not body:
            return ManifestAnswer(await self._resolve(reference), None, PASSED_ON)
        status = MISS_COLLAPSED if self._requests.is_running(_fetching(reference)) else MISS
        return self._fetched(reference, await self._fetch(reference), status)

    def _fetched(self, reference: Reference, got: _Fetched, status: CacheStatus) -> ManifestAnswer:
        holder = got.holder
        if not got.kept:
            return ManifestAnswer(holder.descriptor, holder.raw, PASSED_THROUGH)
        return self._answer(reference.repository, holder, status, body=True, recorded=True)

    async def _unstored(
        self, reference: Reference, record: TagRecord, *, body: bool
    ) -> ManifestAnswer:
        """The tag is known from a HEAD; its manifest is not stored, or not for this repository."""
        if not body:
            # Offline a GET of it is 404, so a HEAD is, too.
            self._upstreams.check_online(ManifestUnknown, reference)
            return ManifestAnswer(record.descriptor, None, HIT)
        by_digest = Reference(reference.repository, digest=record.descriptor.digest)
        try:
            return await self._from_upstream(by_digest, body=True)
        except (ManifestUnknown, DigestMismatch):
            # The tag has moved since, or the HEAD named a wrong digest.
            return await self._from_upstream(reference, body=True)

    async def _revalidate(
        self, reference: Reference, stored: ManifestHolder, *, body: bool
    ) -> ManifestAnswer:
        """Ask whether an expired tag moved; serve the stored manifest where the upstream fails,
        takes longer than `fetch.timeouts.revalidate`, or did so within `fetch.pause`."""
        repository = reference.repository
        if (self._paused.get(reference) or 0) > self._clock.monotonic():
            return self._answer(repository, stored, PAUSED, body=body)
        asking = asyncio.create_task(self._refresh(reference, stored))
        self._tasks.add(asking)
        asking.add_done_callback(self._ended)
        reason: object
        try:
            async with asyncio.timeout(self._config.fetch.timeouts.revalidate):
                # Shielded: an answer that comes too late for this client is for the next one.
                stored, status = await asyncio.shield(asking)
        except TimeoutError:
            status, reason = SLOW, "no answer in time"
        except OciProxyError as exc:
            status, reason = stale_because(exc), exc
        else:
            return self._answer(repository, stored, status, body=body)
        pause = self._config.fetch.pause
        self._paused.put(reference, self._clock.monotonic() + pause)
        log.event(logging.WARNING, "serving stale", reference=reference, reason=reason, pause=pause)
        return self._answer(repository, stored, status, body=body)

    async def _refresh(
        self, reference: Reference, stored: ManifestHolder
    ) -> tuple[ManifestHolder, CacheStatus]:
        descriptor = await self._resolve(reference, stored.descriptor)
        status = REVALIDATED
        if descriptor.digest != stored.descriptor.digest:
            # The tag moves once the new manifest is stored: until then the old one is served.
            by_digest = Reference(reference.repository, digest=descriptor.digest)
            stored, kept = await self._fetch(by_digest)
            if not kept:
                return stored, PASSED_THROUGH
            await self._threads.run(lambda: self._record(reference, stored.descriptor))
            status = UPDATED
        self._paused.drop(reference)
        return stored, status

    def _answer(
        self,
        repository: Repository,
        holder: ManifestHolder,
        status: CacheStatus,
        *,
        body: bool,
        recorded: bool = False,
        told: bool = True,
    ) -> ManifestAnswer:
        """`recorded` says that the repository is known to have the manifest, `told` that the
        upstream said so."""
        if body:
            if not recorded:
                self._hits.record(repository, holder.descriptor, ask=not told)
            if holder.descriptor.is_image or holder.descriptor.is_artifact:
                self._ahead.prefetch(repository, holder)
        return ManifestAnswer(holder.descriptor, holder.raw, status)

    async def _resolve(self, reference: Reference, stored: Descriptor | None = None) -> Descriptor:
        """HEAD at the upstream. Records the tag, unless it moved away from `stored`."""

        def request(backend: Backend) -> Descriptor:
            descriptor = backend.resolve(reference)
            if stored is None or stored.digest == descriptor.digest:
                self._record(reference, stored or descriptor)
            return descriptor

        self._upstreams.check_online(ManifestUnknown, reference)
        return await self._requests.call(reference.repository, ("resolve", reference), request)

    async def _fetch(self, reference: Reference) -> _Fetched:
        """GET at the upstream, into the store."""
        self._upstreams.check_online(ManifestUnknown, reference)
        asked = reference.repository, _fetching(reference), partial(self._take_in, reference)
        while True:
            got = await self._requests.call(*asked)
            if isinstance(got, _Fetched):  # the request of another client may find it stored
                return got

    def _take_in(self, reference: Reference, backend: Backend) -> _Fetched:
        """Blocks. A tag's record is written last."""
        holder = backend.fetch_manifest(reference)
        try:
            self._threads.check_answers()
            with self._store.publishing(patience=_DISK_WAIT) as commit:
                self._store.put_manifest(reference.repository, holder, commit)
                self._record(reference, holder.descriptor, commit)
        except StoreError as exc:
            log.event(logging.WARNING, "passing through", reference=reference, reason=exc)
            return _Fetched(holder, kept=False)
        return _Fetched(holder, kept=True)

    def _record(
        self, reference: Reference, descriptor: Descriptor, joined: Commit | None = None
    ) -> None:
        """Blocks. A tag that cannot be recorded is resolved anew for each client."""
        if (tag := reference.tag) is None:
            return
        commits = self._store.publishing(patience=_DISK_WAIT)
        repository, now = reference.repository, self._clock.now()
        try:
            self._threads.check_answers()
            with commits if joined is None else nullcontext(joined) as commit:
                self._store.put_tag(repository, tag, descriptor, commit, now=now)
        except StoreError as exc:
            log.event(logging.WARNING, "tag not recorded", reference=reference, reason=exc)

    def _ended(self, task: asyncio.Task[tuple[ManifestHolder, CacheStatus]]) -> None:
        self._tasks.discard(task)
        take_error(task)


def _fetching(reference: Reference) -> tuple[str, Reference]:
    return "manifest", reference
