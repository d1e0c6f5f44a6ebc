"""`load`: whole images into the store, several at a time.

For each image the loader stores blobs first, then the manifests that need them, then the tags: a
client sees all of the image or nothing of it, even if the load is interrupted. What the store has
verified is not fetched again, and an interrupted download goes on where it stopped.

Tests: tests/load/test_loader.py, tests/load/test_interrupted.py, tests/load/test_store_beside.py.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import (
    BlobUnknown,
    IntegrityError,
    ManifestUnknown,
    NoRoom,
    OciProxyError,
    StoreError,
    UpstreamDenied,
    UpstreamUnavailable,
)
from ociproxy.fetch.retry import ImageRetry, Progress
from ociproxy.load.image import UpstreamImage, UpstreamImages, all_of
from ociproxy.load.progress import (
    ActiveImage,
    LoadProgress,
    Summary,
    Watcher,
    leave_to_backend,
    watched,
)
from ociproxy.oci.descriptor import IMAGE_CONFIGS
from ociproxy.oci.image import lacking_in, platform_of, platforms_of
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ImageManifest, Index
from ociproxy.oci.reference import Reference
from ociproxy.store.group_commit import PATIENCE, Commit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.engine import Engine
    from ociproxy.fetch.upstreams.upstreams import UpstreamState
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.store.store import Store

    Work = Callable[[ActiveImage, AsyncExitStack], Awaitable[UpstreamImage]]
    """What is done with each image, in its turn; it may end the turn itself."""

_ROUNDS: Final = 3
"""Times at most that the loader fetches an image's blobs. A prune does not remove what one round
brought before the next round ends. A third round therefore means that the store keeps no times."""


class Loader:
    """Belongs to one event loop; loads once."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        watcher: Watcher,
        *,
        referrers: bool = False,
        fail_fast: bool = False,
        known: Store | None = None,
        admits: Callable[[Wanted, UpstreamState], bool] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`known` is the store whose content counts as here, if it is not the engine's: `find` puts
        configs into the engine's. `admits` is asked before an image is begun; one that it refuses
        stays untried."""
        self._engine = engine
        self._store = known or engine.store
        self._stores = (self._store, engine.store)
        self._configs_fetched = 0
        self._partition = config.partition
        self._admitting = asyncio.Lock()
        self._jobs, self._limit = config.load.jobs, config.load.pull_timeout
        self._turns, self._loading = asyncio.Semaphore(self._jobs), 0
        self._slots = asyncio.Semaphore(config.fetch.fills)
        self._watcher = watcher
        self._fail_fast = fail_fast
        self._clock = clock or SystemClock()
        self._retry = ImageRetry(
            config.load.pull_timeout,
            wait_max=config.fetch.retry_wait_max,
            clock=self._clock,
            waiting=watcher.waiting,
        )
        self._images = UpstreamImages(
            self._store, engine.requests, self._retry, referrers=referrers
        )
        self.progress = LoadProgress(engine.blobs.arrived)
        self._stopped, self._ended = False, Event()  # so that a thread waits for room no longer
        self._admits = admits

    async def run(self, wanted: Iterable[Wanted]) -> Summary:
        """Load each image; the failure of one does not stop the others, unless `fail_fast`.

        Raises StoreError at once, for then no image can be stored.
        """
        images = list(wanted)
        async with self._using():
            await self._engine.threads.run(lambda: self._use(images))
            return await self._each(images, self._load)

    async def find(self, wanted: Iterable[Wanted]) -> Summary:
        """Fetch the manifests of each image, and the configs that tell platforms; tell the watcher.
        Of these only the configs are stored."""
        return await self._each(wanted, lambda active, _: self._find(active, plan=True))

    async def _each(self, wanted: Iterable[Wanted], work: Work) -> Summary:
        images = list(wanted)
        summary, turn = self.progress.summary, iter(images)
        summary.untried = len(images)
        try:
            # As many more as load wait for the disk, while further images load.
            await all_of(self._work(turn, work) for _ in range(min(2 * self._jobs, len(images))))
        finally:
            self._ended.set()
            summary.fetched = self._configs_fetched + self._engine.blobs.bytes_fetched
            states = self._engine.upstreams.states()
            summary.quotas = {each.registry: each.quota for each in states if each.quota}
        return summary

    async def _work(self, images: Iterator[Wanted], work: Work) -> None:
        for wanted in images:
            async with AsyncExitStack() as turn:
                await turn.enter_async_context(self._turn())
                if self._stopped:
                    return
                if self._admits is not None:
                    state = self._engine.upstreams.state(wanted.reference.repository.registry)
                    if not self._admits(wanted, state):
                        continue
                active = ActiveImage(wanted, Progress(self._clock.monotonic()))
                self.progress.active.append(active)
                try:
                    image = await work(active, turn)
                except OciProxyError as exc:
                    if isinstance(exc, StoreError) and not isinstance(exc, NoRoom):
                        raise
                    self.progress.summary.add_failed(exc)
                    self._stopped = self._fail_fast
                    self._watcher.failed(wanted, exc)
                else:
                    self.progress.summary.add_loaded(complete=not active.withheld)
                    self._watcher.loaded(active.result(image))
                finally:
                    self.progress.end(active)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Inside, an image is loading, one of `jobs`; before that it waits for its turn."""
        self._loading += 1
        try:
            async with self._turns:
                yield
        finally:
            self._loading -= 1
        if not self._loading:
            self._store.commits.hurry()  # no other image is about to join them

    async def _find(self, active: ActiveImage, *, plan: bool = False) -> UpstreamImage:
        image = await self._images.find(active.wanted, active.progress)
        if plan or active.wanted.strict:
            # Before any layer: a wrong platform must not cost the whole image.
            await all_of(self._fetch_config(active, *each) for each in image.reached)
            await self._engine.threads.run(lambda: self._find_platforms(active.wanted, image))
        async with self._admitting:
            # Before the link is spent.
            missing = await self._engine.threads.run(lambda: self._missing(active, image, plan))
            self.progress.found(active, image, missing)
        return image

    async def _load(self, active: ActiveImage, turn: AsyncExitStack) -> UpstreamImage:
        """Ends the turn when the image only waits for the disk."""
        image = await self._find(active)
        missing = [blob for blob in image.blobs.values() if blob.digest not in active.verified]
        for _ in range(_ROUNDS):
            await all_of(self._fill(active, blob) for blob in missing)
            published = await self._engine.threads.run(lambda: self._publish(active, image))
            if isinstance(published, Commit):
                await turn.aclose()
                await self._durable(published)
                return image
            missing = published
        path = self._store.blobs.path(missing[0].digest)
        raise StoreError(path, "another process removes it while it is loaded")

    async def _durable(self, commit: Commit) -> None:
        """Return when a power cut does not take it away. Takes no thread: the disk gets many at
        once. Raises StoreError."""
        written = asyncio.wrap_future(commit.hand_over())
        done, _ = await asyncio.wait((written,), timeout=PATIENCE)
        for each in done:
            each.result()
        commit.wait(0)

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[None]:
        """Inside, what is seen in the store is not removed from it."""
        using = self._store.staging.using(self._clock.now())
        await self._engine.threads.run(using.__enter__)
        try:
            yield
        finally:
            await self._engine.threads.run(lambda: using.__exit__(None, None, None))

    async def _fill(self, active: ActiveImage, blob: Descriptor) -> None:
        repository = active.wanted.reference.repository

        def received(size: int, mine: bool) -> None:
            if mine:
                active.fetched += size
            if size:
                active.progress.when = self._clock.monotonic()

        waited = False

        async def work() -> None:
            nonlocal waited
            async with self._slots:
                if not waited:
                    # The wait for a slot is not the upstream's fault: its time begins here.
                    waited, active.progress.when = True, self._clock.monotonic()
                blobs, missing = self._engine.blobs, blob.digest in active.absent
                signs = partial(blobs.signs, repository, blob.digest)
                ensured = blobs.ensure(repository, blob, received, missing=missing)
                try:
                    await watched(ensured, signs, self._limit)
                except TimeoutError as exc:
                    reason = f"blob {blob.digest} got no further in {self._limit:g} s"
                    raise UpstreamUnavailable(repository.registry, reason, timed_out=True) from exc

        try:
            await self._retry.run(repository.registry, active.progress, work)
        except (BlobUnknown, UpstreamDenied) as exc:
            if active.may_lack(blob, exc):
                return
            raise
        self.progress.filled(active, blob.digest)

    def _publish(self, active: ActiveImage, image: UpstreamImage) -> list[Descriptor] | Commit:
        """Make the image visible, now that its blobs are stored; the commit makes it durable. Or
        return the blobs that are not stored: they were removed since. Runs in a thread."""
        self._find_platforms(active.wanted, image)
        repository, now = image.reference.repository, self._clock.now()
        with self._store.publishing(gathers=True) as commit:
            size = self._store.blobs.find_size
            expected = (blob for blob in image.blobs.values() if blob not in active.withheld)
            missing = [blob for blob in expected if size(blob.digest) is None]
            if missing:
                return missing
            for holder in image.manifests.values():
                self._store.put_manifest(repository, holder, commit)
            for tag, descriptor in image.tags.items():
                self._store.put_tag(repository, tag, descriptor, commit, now=now)
            commit.hand_over()
        return commit

    def _use(self, images: Iterable[Wanted]) -> None:
        """What is stored of these is not removed to make room for the others."""
        for each in images:
            if top := self._store.refs.find(each.reference):
                self._store.manifests.keep(top.digest)

    def _missing(self, active: ActiveImage, image: UpstreamImage, plan: bool) -> dict[Digest, int]:
        """Bytes of each blob that the store lacks. Raises StoreError; NoRoom, unless for a plan."""
        blobs = self._store.blobs
        stored = {
            digest: blobs.find_size(digest) if plan else active.look(blobs, blob)
            for digest, blob in image.blobs.items()
        }
        active.absent = {digest for digest, size in stored.items() if size is None}
        missing = {d: blob.size for d, blob in image.blobs.items() if stored[d] != blob.size}
        if plan:
            leave_to_backend(self._engine.upstreams, active, image, missing)
        elif missing:
            where, store = image.reference.repository, self._store
            self.progress.check_disk(missing, where, store, self._partition)
            self._engine.room.make(partial(self.progress.unstored, missing, store), self._ended)
        return missing

    # Platforms

    async def _fetch_config(
        self, active: ActiveImage, described: Descriptor, manifest: ImageManifest
    ) -> None:
        """Store the config of an image whose platform nothing else tells, unless it is here."""
        config = manifest.config
        if (
            described.platform is not None
            or config.media_type not in IMAGE_CONFIGS
            or config.size > MANIFEST_MAX_SIZE
            or any(store.blobs.find_size(config.digest) is not None for store in self._stores)
        ):
            return
        repository, store = active.wanted.reference.repository, self._engine.store
        image = Reference(repository, digest=described.digest)

        async def fetch() -> bytes:
            return await self._retry.run(
                repository.registry,
                active.progress,
                lambda: self._engine.requests.call(
                    repository,
                    ("load config", image),
                    lambda backend: backend.fetch_config(image, config),
                ),
            )

        try:
            raw = await fetch()
        except IntegrityError:
            raw = await fetch()  # as a download whose bytes were wrong: once more
        await self._engine.threads.run(lambda: store.commit_config(config.digest, raw))
        active.fetched += len(raw)
        self._configs_fetched += len(raw)

    def _find_platforms(self, wanted: Wanted, image: UpstreamImage) -> None:
        """By the index, else by the config. Blocks. Raises ManifestUnknown if an image without an
        index lacks a platform that its line of the list names."""
        image.platforms = platforms_of(self._platform(*each) for each in image.reached)
        top = image.top.manifest
        if not isinstance(top, ImageManifest) or not image.platforms:
            return
        itself = Index((image.top.descriptor._replace(platform=image.platforms[0]),))
        image.lacking = lacking_in(itself, wanted.platforms)
        if image.lacking and wanted.strict:
            lacking = ", ".join(map(str, image.lacking))
            reason = f"lacks {lacking}; it is for {image.platforms[0]}"
            raise ManifestUnknown(image.reference, reason)

    def _platform(self, described: Descriptor, manifest: ImageManifest) -> Platform | None:
        config = manifest.config.digest
        found = (platform_of(store.blobs.peek(config)) for store in self._stores)
        return described.platform or next((each for each in found if each is not None), None)
