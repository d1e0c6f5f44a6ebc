"""`load`: whole images into the store, several at a time.

For each image the loader stores blobs first, then the manifests that need them, then the tags: a
client sees all of the image or nothing of it, even if the load is interrupted. What the store has
verified is not fetched again, and an interrupted download goes on where it stopped.

Tests: tests/load/test_loader.py, tests/load/test_interrupted.py, tests/load/test_store_beside.py.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import ManifestUnknown, OciProxyError, StoreError, UpstreamUnavailable
from ociproxy.fetch.retry import ImageRetry, Progress
from ociproxy.load.image import UpstreamImage, UpstreamImages, all_of
from ociproxy.load.progress import ActiveImage, LoadProgress, Summary
from ociproxy.oci.image import choose
from ociproxy.oci.manifest import ImageManifest, Index
from ociproxy.store.image import platform_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.errors import UpstreamError
    from ociproxy.fetch.engine import Engine
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository


_ROUNDS: Final = 3
"""Times that the blobs of an image are fetched: what came in one round is not removed before the
next one ends, so that more than two mean that the store keeps no times."""
_LOOKS: Final = 10
"""Looks at a blob within `load.pull_timeout`."""


class Watcher:
    """Hears what becomes of each image; this base class ignores it."""

    def loaded(self, result: Result) -> None:
        """All of an image is in the store; in a plan, it could be."""

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        """An image will not be loaded by this run."""

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        """The loader will ask an upstream again in so many seconds."""


@dataclass(frozen=True, slots=True)
class Result:
    """An image that was loaded or found.

    `missing` has the bytes of each blob that the store lacks: none after a load. `fetched` are
    bytes that came for this image.
    """

    image: UpstreamImage
    missing: dict[Digest, int]
    fetched: int
    seconds: float


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
        clock: Clock | None = None,
    ) -> None:
        self._engine = engine
        self._store = engine.store
        self._jobs = config.load.jobs
        self._limit = config.load.pull_timeout
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
        self._stopped = False

    async def run(self, wanted: Iterable[Wanted]) -> Summary:
        """Load each image; the failure of one does not stop the others, unless `fail_fast`.

        Raises StoreError at once, for then no image can be stored.
        """
        return await self._each(wanted, self._load)

    async def find(self, wanted: Iterable[Wanted]) -> Summary:
        """Fetch the manifests of each image, tell the watcher, and store nothing."""
        return await self._each(wanted, self._find)

    async def _each(
        self, wanted: Iterable[Wanted], work: Callable[[ActiveImage], Awaitable[UpstreamImage]]
    ) -> Summary:
        images = list(wanted)
        summary = self.progress.summary
        summary.untried = len(images)
        turn = iter(images)
        try:
            await all_of(self._work(turn, work) for _ in range(min(self._jobs, len(images))))
        finally:
            summary.fetched = self._engine.blobs.bytes_fetched
            states = self._engine.upstreams.states()
            summary.quotas = {each.registry: each.quota for each in states if each.quota}
        return summary

    async def _work(
        self, turn: Iterator[Wanted], work: Callable[[ActiveImage], Awaitable[UpstreamImage]]
    ) -> None:
        for wanted in turn:
            if self._stopped:
                return
            active = ActiveImage(wanted, Progress(self._clock.monotonic()))
            self.progress.active.append(active)
            try:
                image = await work(active)
            except StoreError:
                raise
            except OciProxyError as exc:
                self.progress.summary.add_failed(exc)
                self._stopped = self._fail_fast
                self._watcher.failed(wanted, exc)
            else:
                self.progress.summary.add_loaded()
                seconds = time.monotonic() - active.began
                self._watcher.loaded(Result(image, active.missing, active.fetched, seconds))
            finally:
                self.progress.end(active)

    async def _find(self, active: ActiveImage) -> UpstreamImage:
        image = await self._images.find(active.wanted, active.progress)
        missing = {
            digest: blob.size
            for digest, blob in image.blobs.items()
            if self._store.blobs.find_size(digest) is None
        }
        self.progress.found(active, image, missing)
        return image

    async def _load(self, active: ActiveImage) -> UpstreamImage:
        async with self._using():
            image = await self._find(active)
            missing = list(image.blobs.values())
            for _ in range(_ROUNDS):
                await all_of(self._fill(active, blob) for blob in missing)
                missing = await self._engine.threads.run(
                    lambda: self._publish(active.wanted, image)
                )
                if not missing:
                    return image
        path = self._store.blobs.path(missing[0].digest)
        raise StoreError(path, "another process removes it while it is loaded")

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
                await self._watched(
                    self._engine.blobs.ensure(repository, blob, received), repository, blob
                )

        await self._retry.run(repository.registry, active.progress, work)
        self.progress.filled(active, blob.digest)

    async def _watched(
        self, work: Coroutine[None, None, None], repository: Repository, blob: Descriptor
    ) -> None:
        """Wait for a blob while it gets on. Raises UpstreamUnavailable where it did not for
        `load.pull_timeout`, and what the work raises."""
        task = asyncio.create_task(work)
        signs, since = None, time.monotonic()
        try:
            while not (await asyncio.wait([task], timeout=self._limit / _LOOKS))[0]:
                fresh = self._engine.blobs.signs(repository, blob.digest)
                if fresh != signs:
                    signs, since = fresh, time.monotonic()
                elif time.monotonic() - since > self._limit:
                    reason = f"blob {blob.digest} got no further in {self._limit:g} s"
                    raise UpstreamUnavailable(repository.registry, reason, timed_out=True)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _publish(self, wanted: Wanted, image: UpstreamImage) -> list[Descriptor]:
        """Make the image visible, now that its blobs are stored. Or return those that are not: they
        were removed since. Runs in a thread."""
        self._check_platform(wanted, image)
        repository, now = image.reference.repository, self._clock.now()
        with self._store.removals.kept_off():
            size = self._store.blobs.find_size
            missing = [blob for blob in image.blobs.values() if size(blob.digest) is None]
            if missing:
                return missing
            for holder in image.manifests.values():
                self._store.commit_manifest(repository, holder)
            for tag, descriptor in image.tags.items():
                self._store.record_tag(repository, tag, descriptor, now=now)
        return []

    def _check_platform(self, wanted: Wanted, image: UpstreamImage) -> None:
        """Only the config of an image tells its platform where no index does. Raises
        ManifestUnknown if the line of the list named another one."""
        manifest = image.top.manifest
        if not isinstance(manifest, ImageManifest):
            return
        platform = platform_of(self._store, manifest)
        if platform is None:
            return
        image.platforms = (platform.normalised(),)
        itself = Index((replace(image.top.descriptor, platform=platform),))
        image.lacking = tuple(each for each in wanted.platforms if not choose(itself, (each,)))
        if image.lacking and wanted.strict:
            lacking = ", ".join(map(str, image.lacking))
            raise ManifestUnknown(image.reference, f"lacks {lacking}; it is for {platform}")
