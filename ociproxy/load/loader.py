"""`load`: whole images into the store, several at a time.

What is promised of each: blobs first, then the manifests that need them, then the tags; so a reader
sees all of an image or nothing, whenever the load is interrupted. What is stored and verified is
not fetched again, and a download that broke off goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import IntegrityError, ManifestUnknown, OciProxyError, StoreError
from ociproxy.fetch.retry import ImageRetry, Progress
from ociproxy.load.image import UpstreamImage, UpstreamImages
from ociproxy.load.tasks import all_of
from ociproxy.oci.manifest import ImageManifest, Index
from ociproxy.oci.platform import choose
from ociproxy.store.image import platform_of
from ociproxy.store.records import TagRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.errors import UpstreamError
    from ociproxy.fetch.engine import Engine
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Descriptor
    from ociproxy.oci.reference import Repository

INCOMPLETE: Final = 3
TRANSIENT: Final = 75


class Watcher:
    """Hears of what happens; this one does nothing about it."""

    def loaded(self, result: Result) -> None:
        """An image is whole in the store; in a plan, it could be."""

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        """An image is not."""

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        """Something that may pass is waited out."""


@dataclass(slots=True, eq=False)
class Active:
    """An image that is being loaded. `missing` is what it still needs, in bytes by blob."""

    wanted: Wanted
    progress: Progress
    began: float = field(default_factory=time.monotonic)
    image: UpstreamImage | None = None
    missing: dict[Digest, int] = field(default_factory=dict)
    size: int = 0
    """Bytes of the blobs that were missing when it began."""
    fetched: int = 0
    """Bytes that came from the upstream for it; what another image fetched meanwhile is not."""


@dataclass(frozen=True, slots=True)
class Result:
    """An image that was loaded; `missing` are bytes of the blobs that a plan found missing."""

    image: UpstreamImage
    missing: dict[Digest, int]
    fetched: int
    seconds: float


@dataclass(slots=True)
class Summary:
    """`untried` are the images whose turn did not come, or was cut short."""

    loaded: int = 0
    failed: int = 0
    untried: int = 0
    fetched: int = 0
    exit_code: int = 0

    def add(self, error: OciProxyError) -> None:
        """The gravest failure decides: integrity, then what another run cannot mend."""
        self.failed += 1
        codes = {self.exit_code, error.exit_code}
        if isinstance(error, IntegrityError) or IntegrityError.exit_code in codes:
            self.exit_code = IntegrityError.exit_code
        elif codes <= {0, TRANSIENT}:
            self.exit_code = TRANSIENT
        else:
            self.exit_code = INCOMPLETE


class Loader:
    """Belongs to one event loop; used once."""

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
        self.active: list[Active] = []
        self.summary = Summary()
        self._stopped = False
        self._found = 0
        self._expected = 0
        self._ended_bytes = 0
        self._pending: dict[Digest, tuple[Repository, int]] = {}

    @property
    def arrived(self) -> int:
        """Bytes that are here of all blobs that were missing, each counted once."""
        arriving = (
            self._engine.blobs.arrived(repository, digest)
            for digest, (repository, _) in self._pending.items()
        )
        return self._ended_bytes + sum(arriving)

    @property
    def expected(self) -> int | None:
        """Bytes that will have arrived in the end; what images whose turn has not come may need
        is guessed from the others. None while nothing is known."""
        if not self._found:
            return None
        unfound = self.summary.untried - sum(each.image is not None for each in self.active)
        return self._expected + self._expected * max(unfound, 0) // self._found

    def arrived_of(self, active: Active) -> int:
        """Bytes that are here of the blobs that were missing of one image."""
        repository = active.wanted.reference.repository
        arriving = (self._engine.blobs.arrived(repository, digest) for digest in active.missing)
        return active.size - sum(active.missing.values()) + sum(arriving)

    def missing(self, image: UpstreamImage) -> dict[Digest, int]:
        """Bytes of each blob that the store lacks."""
        return {
            digest: blob.size
            for digest, blob in image.blobs.items()
            if self._store.blobs.find_size(digest) is None
        }

    async def run(self, wanted: Iterable[Wanted]) -> Summary:
        """Load them all, whatever becomes of each. Raises StoreError: then nothing more is of
        use."""
        return await self._each(wanted, self._load)

    async def find(self, wanted: Iterable[Wanted]) -> Summary:
        """Only find out what each consists of: nothing is stored. The watcher hears it all."""
        return await self._each(wanted, self._find)

    async def _each(
        self, wanted: Iterable[Wanted], work: Callable[[Active], Awaitable[UpstreamImage]]
    ) -> Summary:
        images = list(wanted)
        self.summary.untried = len(images)
        turn = iter(images)
        try:
            await all_of(self._work(turn, work) for _ in range(min(self._jobs, len(images))))
        finally:
            self.summary.fetched = self._engine.blobs.bytes_fetched
        return self.summary

    async def _work(
        self, turn: Iterator[Wanted], work: Callable[[Active], Awaitable[UpstreamImage]]
    ) -> None:
        for wanted in turn:
            if self._stopped:
                return
            active = Active(wanted, Progress(self._clock.monotonic()))
            self.active.append(active)
            try:
                image = await work(active)
            except StoreError:
                raise
            except OciProxyError as exc:
                self._failed(wanted, exc)
            else:
                self._loaded(active, image)
            finally:
                self.active.remove(active)
                self._give_up(active)

    def _loaded(self, active: Active, image: UpstreamImage) -> None:
        self.summary.untried -= 1
        self.summary.loaded += 1
        seconds = time.monotonic() - active.began
        self._watcher.loaded(Result(image, active.missing, active.fetched, seconds))

    def _failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self.summary.untried -= 1
        self.summary.add(error)
        self._stopped = self._fail_fast
        self._watcher.failed(wanted, error)

    async def _find(self, active: Active) -> UpstreamImage:
        image = await self._images.find(active.wanted, active.progress)
        active.missing = self.missing(image)
        active.size = sum(active.missing.values())
        active.image = image
        self._expect(active)
        return image

    async def _load(self, active: Active) -> UpstreamImage:
        image = await self._find(active)
        await all_of(self._fill(active, blob) for blob in image.blobs.values())
        await self._engine.threads.run(lambda: self._publish(active.wanted, image))
        return image

    async def _fill(self, active: Active, blob: Descriptor) -> None:
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
                    # Other images' blobs came first: that was no fault of this one's upstream.
                    waited, active.progress.when = True, self._clock.monotonic()
                await self._engine.blobs.ensure(repository, blob, received)

        await self._retry.run(repository.registry, active.progress, work)
        active.missing.pop(blob.digest, None)
        _, size = self._pending.pop(blob.digest, (repository, 0))
        self._ended_bytes += size

    def _expect(self, active: Active) -> None:
        self._found += 1
        for digest, size in active.missing.items():
            if digest not in self._pending:
                self._pending[digest] = active.wanted.reference.repository, size
                self._expected += size

    def _give_up(self, active: Active) -> None:
        """What is still missing of an image that has ended is expected for others only."""
        for digest in active.missing:
            if not any(digest in other.missing for other in self.active):
                _, size = self._pending.pop(digest, (None, 0))
                self._expected -= size

    def _publish(self, wanted: Wanted, image: UpstreamImage) -> None:
        """In a thread: what was waited for is there now, so the image may be seen."""
        self._check_platform(wanted, image)
        repository = image.reference.repository
        for holder in image.manifests.values():
            self._store.commit_manifest(repository, holder)
        now = self._clock.now()
        for tag, descriptor in image.tags.items():
            record = TagRecord(descriptor, now, repository.registry)
            self._store.refs.put_tag(repository, tag, record)

    def _check_platform(self, wanted: Wanted, image: UpstreamImage) -> None:
        """An image that is in no index says in its config what it is for."""
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
