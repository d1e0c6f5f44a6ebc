"""How far a load has come: images and bytes, for its bars, its last line and its exit code.

A blob that several images share is counted once in the whole, and once in each image.
Tests: tests/cli/test_progress.py, tests/load/test_loader.py.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.errors import IntegrityError, NoRoom, OciProxyError
from ociproxy.oci.manifest import Index, parse_manifest
from ociproxy.store.room import free_space

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from ociproxy.errors import BlobUnknown, UpstreamDenied, UpstreamError
    from ociproxy.fetch.backend import Quota
    from ociproxy.fetch.retry import Progress
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.load.image import UpstreamImage
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.blobs import Blobs
    from ociproxy.store.store import Store

_INCOMPLETE: Final = 3
_TRANSIENT: Final = 75
_LOOKS: Final = 10
"""Looks at work that is watched within its limit."""


@dataclass(slots=True, eq=False)
class ActiveImage:
    """An image that is being loaded; `progress` is when bytes last came for it."""

    wanted: Wanted
    progress: Progress
    began: float = field(default_factory=time.monotonic)
    image: UpstreamImage | None = None
    """None until all its manifests are known."""
    missing: dict[Digest, int] = field(default_factory=dict)
    """Bytes of each blob that the store still lacks."""
    absent: set[Digest] = field(default_factory=set)
    """Blobs that the store did not have at all when it was looked through."""
    verified: set[Digest] = field(default_factory=set)
    """Blobs that the store had then, right for certain. They are not looked at again."""
    size: int = 0
    """Bytes of all blobs that the store lacked when the manifests became known."""
    withheld: dict[Descriptor, str] = field(default_factory=dict)
    """Layers that need not be distributed, and why the upstream does not give them."""
    fetched: int = 0
    """Bytes that the upstream sent for this image; bytes of a shared blob that another image
    fetched are not among them."""

    def look(self, blobs: Blobs, blob: Descriptor) -> int | None:
        """Bytes of a stored blob, which counts as used. Raises StoreError."""
        found = blobs.find(blob.digest)
        if found is None:
            return None
        found.file.close()
        if found.sealed and found.size == blob.size:
            self.verified.add(blob.digest)
        return found.size

    def result(self, image: UpstreamImage) -> Result:
        seconds = time.monotonic() - self.began
        return Result(image, self.missing, self.fetched, seconds, dict(self.withheld))

    def may_lack(self, blob: Descriptor, error: BlobUnknown | UpstreamDenied) -> bool:
        """Whether the image is of use without this blob, which the upstream refuses with `error`.
        Referrers and signatures that need it are left out then."""
        image = self.image
        if image is not None and blob.digest not in image.needed:
            _leave_out(image, blob.digest, error)
        elif blob.is_nondistributable:
            # Registries need not have such layers: a client may have them.
            self.withheld[blob] = error.reason
        else:
            return False
        return True


def leave_to_backend(
    upstreams: Upstreams, active: ActiveImage, image: UpstreamImage, missing: dict[Digest, int]
) -> None:
    """For a plan: take out of `missing` what the backend never brings, as a load finds out at each
    blob. Blocks. Raises BlobUnknown for a blob without which the image fails, kinds of
    UpstreamError where no backend can be made, or StoreError."""
    if not missing:
        return
    active.image, repository = image, image.reference.repository
    backend = upstreams.backend(repository.registry)
    for digest, error in backend.refusals(repository, image.manifests.values(), missing).items():
        if not active.may_lack(image.blobs[digest], error):
            raise error
        del missing[digest]


def _leave_out(image: UpstreamImage, blob: Digest, error: OciProxyError) -> None:
    """Take the manifests that need this blob out of the image, with the indexes and tags that need
    those. What a referrers tag lists may be gone: its index comes before, and stays."""
    gone = {blob}
    for digest, holder in image.manifests.items():
        manifest = parse_manifest(holder.raw, holder.descriptor.media_type)
        parts = manifest.manifests if isinstance(manifest, Index) else manifest.blobs
        if digest not in image.needed and not gone.isdisjoint(part.digest for part in parts):
            gone.add(digest)
    if len(gone) > 1:
        image.refused.append(error)
    del image.blobs[blob]
    image.manifests = {d: each for d, each in image.manifests.items() if d not in gone}
    image.tags = {tag: each for tag, each in image.tags.items() if each.digest not in gone}


@dataclass(slots=True)
class Summary:
    """Numbers of images, and bytes fetched. `untried` images were not begun, or not ended."""

    loaded: int = 0
    failed: int = 0
    untried: int = 0
    fetched: int = 0
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """What each registry that has a rate limit said last of it."""
    incomplete: int = 0
    """Of the loaded images those that lack a layer that their upstream need not have."""
    transient: bool = False
    """Whether every failure may pass: the caller may run the same load again."""
    _corrupt: bool = False
    _full: bool = False

    @property
    def exit_code(self) -> int:
        """The gravest failure decides: wrong bytes, then no room for an image, then what another
        run cannot mend."""
        if self._corrupt:
            return IntegrityError.exit_code
        if self._full:
            return NoRoom.exit_code
        if self.transient:
            return _TRANSIENT
        return _INCOMPLETE if self.failed or self.incomplete else 0

    def add_loaded(self, *, complete: bool) -> None:
        self.untried -= 1
        self.loaded += 1
        self.incomplete += not complete

    def add_failed(self, error: OciProxyError) -> None:
        self.transient = error.transient and (self.transient or not self.failed)
        self._corrupt = self._corrupt or isinstance(error, IntegrityError)
        self._full = self._full or isinstance(error, NoRoom)
        self.untried -= 1
        self.failed += 1


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

    `missing` has the bytes of each blob that the store lacks, after a load only those that the
    upstream refuses and that the image may lack. `withheld` are the layers among them, which need
    not be distributed, with the upstream's reason. `fetched` are bytes that came for this image.
    """

    image: UpstreamImage
    missing: dict[Digest, int]
    fetched: int
    seconds: float
    withheld: Mapping[Descriptor, str] = field(default_factory=dict)


class LoadProgress:
    """Belongs to one event loop. `arrived` says how many bytes of a blob are here already."""

    def __init__(self, arrived: Callable[[Repository, Digest], int]) -> None:
        self.active: list[ActiveImage] = []
        self.summary = Summary()
        self._arrived = arrived
        self._known_images = 0
        self._expected = 0
        self._filled = 0
        self._pending: dict[Digest, tuple[Repository, int]] = {}
        """Where each missing blob comes from, and its bytes."""

    @property
    def arrived(self) -> int:
        """Bytes that are here of all blobs that were missing."""
        pending = ((repository, digest) for digest, (repository, _) in self._pending.items())
        return self._filled + sum(self._arrived(*each) for each in pending)

    @property
    def expected(self) -> int | None:
        """Bytes that will be here in the end: the images that are not known yet are taken to need
        as much as the average of those that are. None before the first is known."""
        if not self._known_images:
            return None
        active = sum(each.image is not None for each in self.active)
        unknown = max(self.summary.untried - active, 0)
        return self._expected + self._expected * unknown // self._known_images

    def arrived_of(self, active: ActiveImage) -> int:
        """Bytes that are here of the blobs that one image lacked."""
        repository = active.wanted.reference.repository
        arriving = (self._arrived(repository, digest) for digest in active.missing)
        return active.size - sum(active.missing.values()) + sum(arriving)

    def coming(
        self,
        missing: Mapping[Digest, int],
        held: Callable[[Repository, Digest], int],
        repository: Repository,
    ) -> int:
        """Bytes that the disk will get: of these blobs, and of those that other images fetch.
        `held` says how many of a blob it has already."""
        coming = {digest: (repository, size) for digest, size in missing.items()} | self._pending
        return sum(
            max(size - max(self._arrived(where, digest), held(where, digest)), 0)
            for digest, (where, size) in coming.items()
        )

    def check_disk(
        self,
        missing: Mapping[Digest, int],
        repository: Repository,
        store: Store,
        partition: Callable[[str], str],
    ) -> None:
        """Raises NoRoom where the disk lacks room for these blobs, and those that other images
        fetch. `partition` is `Config.partition`."""

        def held(where: Repository, digest: Digest) -> int:
            return store.staging.held(digest, partition(where.registry))

        free = free_space(store.root)
        if self.coming(missing, lambda *_: 0, repository) < free:
            return  # so is what is left of it: no need to look what the disk has already
        needed = self.coming(missing, held, repository)
        if needed >= free:
            reason = f"no space left on device: {needed} bytes to come, {free} free"
            raise NoRoom(store.root, reason)

    def unstored(self, missing: Mapping[Digest, int], store: Store) -> int:
        """Bytes that the store will get: of these blobs, and of those that other images fetch. Any
        thread may call it. Raises StoreError."""
        pending = {digest: size for digest, (_, size) in dict(self._pending).items()}
        coming = pending | dict(missing)
        # One that has just come is counted there already.
        return sum(s for digest, s in coming.items() if store.blobs.find_size(digest) is None)

    def found(self, active: ActiveImage, image: UpstreamImage, missing: dict[Digest, int]) -> None:
        """The manifests of an image are known, and `missing` are the blobs to fetch."""
        active.image, active.missing, active.size = image, missing, sum(missing.values())
        self._known_images += 1
        for digest, size in missing.items():
            if digest not in self._pending:
                self._pending[digest] = active.wanted.reference.repository, size
                self._expected += size

    def filled(self, active: ActiveImage, digest: Digest) -> None:
        """A blob of this image is in the store."""
        active.missing.pop(digest, None)
        _, size = self._pending.pop(digest, (None, 0))
        self._filled += size

    def end(self, active: ActiveImage) -> None:
        """An image has ended: what it still lacks is expected only if another image lacks it."""
        self.active.remove(active)
        for digest in active.missing:
            if not any(digest in other.missing for other in self.active):
                _, size = self._pending.pop(digest, (None, 0))
                self._expected -= size


async def watched(
    work: Coroutine[None, None, None], signs: Callable[[], object], limit: float
) -> None:
    """Wait for work while it gets on, which is while `signs` changes; None of it says nothing.
    Raises TimeoutError after `limit` seconds without, and what the work raises."""
    loop = asyncio.get_running_loop()
    seen: object = None
    looking: asyncio.TimerHandle

    def look() -> None:
        nonlocal seen, looking
        if timeout.expired():
            return
        fresh = signs()
        if fresh is None or fresh != seen:
            seen = fresh
            timeout.reschedule(loop.time() + limit)
        looking = loop.call_later(limit / _LOOKS, look)

    async with asyncio.timeout(limit) as timeout:
        looking = loop.call_later(limit / _LOOKS, look)
        try:
            await work
        finally:
            looking.cancel()
