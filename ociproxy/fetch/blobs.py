"""Blobs, pulled through: the stored file, or the fill that brings it.

Tests: tests/serve/test_blobs.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.errors import (
    BlobUnknown,
    DigestMismatch,
    IntegrityError,
    OciProxyError,
    SizeMismatch,
    StoreError,
    UpstreamError,
)
from ociproxy.fetch.cache_status import (
    FILL,
    FOLLOW,
    HIT,
    PASSED_ON,
    PASSED_THROUGH,
    CacheStatus,
)
from ociproxy.fetch.upstreams.requests import still_away
from ociproxy.fetch.upstreams.threads import take_error
from ociproxy.oci.digest import Digest
from ociproxy.store.read_only import BlobFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.config.settings import Config
    from ociproxy.fetch.download.fill import Fill
    from ociproxy.fetch.download.fills import Fills
    from ociproxy.fetch.isolation import Isolation
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.reference import Repository
    from ociproxy.store.read_only import ReadOnlyContent
    from ociproxy.store.store import Store

    Received = Callable[[int, bool], None]

_KNOWN_SIZES: Final = 65_536
_OTHERS_TIME: Final = 1.0
"""Seconds that a client of one upstream waits for what another one was asked."""
_LOOKS: Final = 8
"""Copies of a blob, in the store and in bundles, that are looked at before giving up: each may be
damaged, or written to while it is verified."""


class BlobPuller:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        threads: StoreThreads,
        verifiers: StoreThreads,
        fills: Fills,
        isolation: Isolation | None,
        config: Config,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._threads = threads
        self._verifiers = verifiers
        self._fills = fills
        self._isolation = isolation
        self._config = config
        self._sizes: BoundedCache[tuple[Repository, Digest], int] = BoundedCache(_KNOWN_SIZES)
        self._verifying: dict[Digest, asyncio.Task[None]] = {}

    async def pull(
        self, repository: Repository, digest: Digest
    ) -> tuple[BlobFile | Fill, CacheStatus]:
        """The stored blob, open, or a fill that has started.

        Raises BlobUnknown, UpstreamError kinds, IntegrityError kinds, Busy or StoreError.
        """
        async with self._upstreams.answer_time(repository.registry):
            if self._isolation is not None:
                await self._isolation.check_allowed(repository, digest)
            try:
                return await self._pull(repository, digest)
            except StoreError as exc:
                return await self.relay(repository, digest, exc), PASSED_THROUGH

    async def relay(self, repository: Repository, digest: Digest, reason: StoreError) -> Fill:
        """A fill for one client that has started, of a blob that the store cannot keep or give.
        Raises `reason` where no upstream may be asked, else what `pull` does."""
        if self._upstreams.offline:
            raise reason
        registry = repository.registry
        # The probe may be the fill of this client that the store has just ended.
        if self._upstreams.probe_wait(registry) is None:
            self._upstreams.check(repository)
        log.event(logging.WARNING, "passing through", digest=digest, reason=reason)
        fill = self._fills.relay(repository, digest, backend=self._upstreams.backend(registry))
        try:
            await self._started(fill, registry)
        except BaseException as exc:
            fill.leave()
            if isinstance(exc, OciProxyError):
                self._upstreams.record_result(registry, exc)
            raise
        return fill

    async def _pull(
        self, repository: Repository, digest: Digest, *, missing: bool = False
    ) -> tuple[BlobFile | Fill, CacheStatus]:
        found = None if missing else await self._find(digest)
        if found is not None:
            return found, HIT
        fill = self.running(repository, digest)
        status = FILL if fill is None else FOLLOW
        if fill is None:
            fill = self._start(repository, digest)
        elif fill.repository.registry != repository.registry and await self._is_silent(fill):
            # This client's own upstream need not be.
            fill, status = self._start(repository, digest, partition=repository.registry), FILL
        try:
            await self._started(fill, repository.registry)
        except (BlobUnknown, UpstreamError, IntegrityError):
            if fill.repository == repository:
                raise
            # That was the answer for another repository's client: ask for this one.
            fill, status = self._start(repository, digest), FILL
            await self._started(fill, repository.registry)
        if fill.succeeded:
            # The fill ended before this task ran again: the store has the blob now.
            found = await self._find(digest)
            if found is not None:
                return found, status
        return fill, status

    def running(self, repository: Repository, digest: Digest) -> Fill | None:
        """The fill from this repository's own upstream, else the one that others share with it."""
        registry = repository.registry
        own = self._fills.running(digest, registry)
        return own or self._fills.running(digest, self._config.partition(registry))

    async def _is_silent(self, fill: Fill) -> bool:
        """Whether the upstream of a fill does not answer for `_OTHERS_TIME`."""
        try:
            async with asyncio.timeout(_OTHERS_TIME):
                with fill.reading(), suppress(OciProxyError):
                    await fill.started()
        except TimeoutError:
            return True
        return False

    async def ensure(
        self, repository: Repository, blob: Descriptor, received: Received, *, missing: bool
    ) -> None:
        """Wait until the blob is stored and verified, also through the second try of a fill whose
        bytes were wrong. One that the caller found `missing` just now is not looked for. `received`
        is told how many bytes an ended fill has brought, and whether this call began it. Raises
        what `pull` does, and SizeMismatch where the descriptor's size is wrong."""
        self.expect(repository, blob)
        found: BlobFile | Fill | None
        try:
            found, status = await self._pull(repository, blob.digest, missing=missing)
            if not isinstance(found, BlobFile):
                await _finished(found, status, received)
        except IntegrityError:
            found = self.running(repository, blob.digest)
            if found is None:
                raise
            await _finished(found, FILL, received)
        if isinstance(found, BlobFile):
            found.file.close()
        if found.size is not None and found.size != blob.size:
            raise SizeMismatch(f"blob {blob.digest}", blob.size, found.size)

    def arrived(self, repository: Repository, digest: Digest) -> int:
        """Bytes that have arrived of a blob that this process is fetching; 0 for any other blob."""
        fill = self.running(repository, digest)
        return 0 if fill is None else fill.download.bytes_resumed + fill.download.bytes_fetched

    def signs(self, repository: Repository, digest: Digest) -> object:
        """Changes while a blob that this process is fetching gets on. None where no upstream is
        waited for."""
        fill = self.running(repository, digest)
        return None if fill is None else fill.download.signs

    @property
    def bytes_fetched(self) -> int:
        """Bytes that upstreams have sent for all fills."""
        return self._fills.bytes_fetched

    async def size(self, repository: Repository, digest: Digest) -> tuple[int, CacheStatus]:
        """Bytes of a blob. Where it is not stored the upstream is asked, but sends no body."""
        async with self._upstreams.answer_time(repository.registry):
            if self._isolation is not None:
                await self._isolation.check_allowed(repository, digest)
            return await self._size(repository, digest)

    async def _size(self, repository: Repository, digest: Digest) -> tuple[int, CacheStatus]:
        try:
            size = await self._threads.look(partial(self._store.blobs.find_size, digest))
        except StoreError:
            if self._upstreams.offline:
                raise
            size = None
        if size is not None:
            return size, HIT
        fill = self.running(repository, digest)
        if fill is not None:
            await self._started(fill, repository.registry)
            if fill.size is not None:
                return fill.size, FOLLOW
        self._upstreams.check_online(BlobUnknown, digest)
        size = await self._requests.call(
            repository,
            ("blob", repository, digest),
            lambda backend: backend.stat_blob(repository, digest),
        )
        if size == 0 and digest != (nothing := Digest.of(b"", digest.algorithm)):
            raise DigestMismatch("blob", digest, nothing)
        self._sizes.put((repository, digest), size)
        return size, PASSED_ON

    def expect(self, repository: Repository, blob: Descriptor) -> None:
        """A manifest of the repository names this blob: its size is known before the upstream
        tells it."""
        self._sizes.put((repository, blob.digest), blob.size)

    async def _find(self, digest: Digest) -> BlobFile | None:
        """A verified blob, open. Raises StoreError for one that is written to all the time."""
        for _ in range(_LOOKS):
            found = await self._look(digest)
            if found is None or found.sealed:
                return found
            found.file.close()
            verifying = self._verifying.get(digest)
            if verifying is None:
                verifying = asyncio.create_task(self._verify(digest, found.content))
                self._verifying[digest] = verifying
                verifying.add_done_callback(partial(self._verified, digest))
            # Shielded: other clients wait for the same verification.
            await asyncio.shield(verifying)
        raise StoreError(self._store.blobs.path(digest), "changes while it is read")

    async def _look(self, digest: Digest) -> BlobFile | None:
        """The event loop looks where the disk is not asked: for most blobs that are asked for, and
        for those that are not there."""
        found, known = self._store.blobs.find_cached(digest)
        if known:
            return found
        late = lambda blob: blob and blob.file.close()  # noqa: E731
        return await self._threads.look(partial(self._store.blobs.find, digest), late)

    async def _verify(self, digest: Digest, content: ReadOnlyContent | None) -> None:
        """One at a time for one blob: clients that wait for it take no thread."""
        try:
            await self._verifiers.run(partial(self._store.blobs.verify, digest, content))
        except IntegrityError as exc:
            log.event(logging.ERROR, "damaged blob", digest=digest, reason=exc)

    def _verified(self, digest: Digest, verifying: asyncio.Task[None]) -> None:
        del self._verifying[digest]
        take_error(verifying)

    def _start(
        self,
        repository: Repository,
        digest: Digest,
        *,
        background: bool = False,
        partition: str | None = None,
    ) -> Fill:
        self._upstreams.check_online(BlobUnknown, digest)
        key = ("blob", repository, digest)
        self._requests.check_refused(key)
        if not background:
            self._fills.check_room(repository.registry)
        # The last check before the start: the breaker counts on this fill as its probe.
        self._upstreams.check(repository)
        return self._fills.start(
            repository,
            digest,
            partition=self._config.partition(repository.registry)
            if partition is None
            else partition,
            backend=self._upstreams.backend(repository.registry),
            size=self._sizes.get((repository, digest)),
            check=partial(self._upstreams.check_again, repository),
            ended=partial(self._learn, repository.registry, key),
        )

    def start_missing(self, repository: Repository, blob: Descriptor) -> Fill | None:
        """Begin to fetch a blob in the background; None where it is stored. Raises what `pull`
        does."""
        # The thread of a download looks again, before it asks the upstream.
        if not self._threads.is_remote and self._store.blobs.find_size(blob.digest) is not None:
            return None
        return self._start(repository, blob.digest, background=True)

    def _learn(
        self, registry: str, key: object, error: OciProxyError | None, answered: bool
    ) -> None:
        if error is not None:
            self._requests.keep_refusal(key, error)
        self._upstreams.record_result(registry, error, asked=error is not None or answered)

    async def _started(self, fill: Fill, registry: str) -> None:
        """Wait for `fill.started`; for PROBE_WAIT only where the upstream was away until now."""
        try:
            async with asyncio.timeout(self._upstreams.probe_wait(registry)):
                with fill.reading():
                    await fill.started()
        except TimeoutError as exc:
            raise still_away(registry) from exc
        # A fill that follows another process, or that another registry's client began, tells
        # nothing of this upstream.
        if fill.download.answered and fill.repository.registry == registry:
            self._upstreams.record_result(registry, None)


async def _finished(fill: Fill, status: CacheStatus, received: Received) -> None:
    try:
        with fill.reading():
            await fill.finished()
    finally:
        received(fill.download.bytes_fetched, status is FILL)
