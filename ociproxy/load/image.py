"""What an image consists of at its upstream: manifests are fetched, blobs named, nothing stored.

A manifest that the store has, hash-verified, is not fetched again where the upstream has sent it
for this repository before. The upstream is always asked what a tag stands for.
Tests: tests/load/test_loader.py, tests/load/test_referrers.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy.errors import (
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamInvalid,
)
from ociproxy.fetch.backend import NO_SUCH_LISTING
from ociproxy.load.imagelist import ALL_PLATFORMS
from ociproxy.oci.descriptor import (
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    OCI_INDEX,
    MalformedManifest,
)
from ociproxy.oci.image import BEYOND_LIMITS, ImageWalk, choose, lacking_in, platforms_of
from ociproxy.oci.manifest import ImageManifest, Index, parse_manifest
from ociproxy.oci.reference import DEFAULT_TAG, Reference, referrers_tag, signature_tags
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.retry import ImageRetry, Progress
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Manifest, ManifestHolder
    from ociproxy.oci.platform import Platform
    from ociproxy.store.store import Store


T = TypeVar("T")

_MAX_REFERRER_DEPTH: Final = 4
"""Referrers of referrers. In use are two levels: a bill of materials, and its signature."""
_MAX_REFERRERS: Final = 1000
"""Of one manifest. Each costs the upstream's quota a pull; more than a few dozen are not in use."""
_NOT_THERE: Final = (ManifestUnknown, NameUnknown, UpstreamDenied, UpstreamInvalid)
"""Errors of what an image may come without. Some registries refuse a tag that they do not have."""


@dataclass(slots=True)
class UpstreamImage:
    """An image, with its referrers where they were asked for.

    `manifests` and `tags` are in the order in which they may be published: each manifest after its
    children, the image's own tag last.
    """

    reference: Reference
    top: ManifestHolder
    manifests: dict[Digest, ManifestHolder] = field(default_factory=dict)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    tags: dict[str, Descriptor] = field(default_factory=dict)
    reached: list[tuple[Descriptor, ImageManifest]] = field(default_factory=list)
    """The image manifests, without those of referrers, each as its index describes it."""
    platforms: tuple[Platform, ...] = ()
    """Of `reached`, as an export of the same images says them. The loader fills it in."""
    lacking: tuple[Platform, ...] = ()
    """Wanted platforms that the image does not offer."""
    pulls: set[Reference] = field(default_factory=set)
    """Manifests that the upstream sent, each a pull of its quota: the store lacked them."""
    refused: list[OciProxyError] = field(default_factory=list)
    """Of the referrers and tags of signatures: those that the upstream does not hand out."""
    needed: frozenset[Digest] = frozenset()
    """The manifests and blobs of the image itself, without which it is not loaded."""

    @property
    def size(self) -> int:
        """Bytes of all manifests and blobs."""
        manifests = sum(len(holder.raw) for holder in self.manifests.values())
        return manifests + sum(blob.size for blob in self.blobs.values())


class UpstreamImages:
    """Finds images at their upstreams. Belongs to one event loop."""

    def __init__(
        self, store: Store, requests: Requests, retry: ImageRetry, *, referrers: bool
    ) -> None:
        self._store = store
        self._requests = requests
        self._retry = retry
        self._referrers = referrers

    async def find(self, wanted: Wanted, progress: Progress) -> UpstreamImage:
        """Raises ManifestUnknown, NameUnknown, StoreError, or kinds of UpstreamError and
        IntegrityError."""
        finding = _Finding(
            self._store,
            self._requests,
            self._retry,
            progress,
            wanted,
            referrers=self._referrers,
        )
        return await finding.image()


class _Finding:
    """Finds one image."""

    def __init__(
        self,
        store: Store,
        requests: Requests,
        retry: ImageRetry,
        progress: Progress,
        wanted: Wanted,
        *,
        referrers: bool,
    ) -> None:
        self._store = store
        self._requests = requests
        self._retry = retry
        self._progress = progress
        self._wanted = wanted
        self._with_referrers = referrers
        self._repository = wanted.reference.repository
        self._subjects: set[Digest] = set()
        self._pulls: set[Reference] = set()
        self._reached: list[tuple[Descriptor, ImageManifest]] = []

    async def image(self) -> UpstreamImage:
        top = await self._top()
        reference = self._wanted.reference
        image = UpstreamImage(reference, top, pulls=self._pulls)
        await self._add(image, top, self._wanted.platforms)
        self._check_platforms(image, top)
        image.reached = list(self._reached)
        image.needed = frozenset((*image.manifests, *image.blobs))
        if self._with_referrers:
            for subject in list(image.manifests):
                await self._add_referrers(image, subject, depth=1)
        if reference.tag is not None:
            image.tags[reference.tag] = top.descriptor
        return image

    async def _top(self) -> ManifestHolder:
        reference = self._wanted.reference
        if reference.digest is not None:
            if reference.tag is not None and not self._wanted.pinned:
                await self._check_pair(replace(reference, digest=None), reference.digest)
            return await self._by_digest(reference.digest)
        record = self._store.refs.find_tag(self._repository, reference.tag or DEFAULT_TAG)
        if record is None or self._store.manifests.find(record.descriptor.digest) is None:
            return await self._fetch(reference)
        # Most tags have not moved, and a HEAD request costs no pull quota.
        descriptor = await self._resolve(reference)
        return await self._by_digest(descriptor.digest)

    async def _check_pair(self, tagged: Reference, expected: Digest) -> None:
        descriptor = await self._resolve(tagged)
        if descriptor.digest != expected:
            raise DigestMismatch(tagged, expected, descriptor.digest)

    async def _by_digest(self, digest: Digest) -> ManifestHolder:
        # The store may have it from another repository. What is loaded here is served under this
        # one from then on, so the upstream must have sent it for this one.
        known = self._store.refs.find_manifest(self._repository, digest)
        found = None if known is None else self._store.manifests.find(digest)
        if found is None:
            return await self._fetch(Reference(self._repository, digest=digest))
        return with_media_type(found, known)

    async def _add(
        self,
        image: UpstreamImage,
        top: ManifestHolder,
        platforms: tuple[Platform, ...] = ALL_PLATFORMS,
    ) -> None:
        """Add this manifest to the image, after its children for these platforms."""
        walk = ImageWalk(top.descriptor)
        holders = {top.descriptor.digest: top}

        async def fetch(descriptor: Descriptor) -> None:
            digest = descriptor.digest
            if digest not in holders and digest not in image.manifests:
                holders[digest] = await self._by_digest(digest)

        def children(descriptor: Descriptor) -> Sequence[Descriptor]:
            digest = descriptor.digest
            if digest in image.manifests:
                return ()
            if holders[digest].descriptor.media_type in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
                reason = f"manifest {digest} has Docker's schema 1: outdated"
                raise ManifestInvalid(self._repository.registry, reason)
            manifest = self._parse(holders[digest])
            image.blobs.update((blob.digest, blob) for blob in manifest.blobs)
            if isinstance(manifest, ImageManifest):
                self._reached.append((descriptor, manifest))
            if not isinstance(manifest, Index):
                return ()
            return choose(manifest, platforms, attestations=self._with_referrers)

        while walk.level:
            await all_of(map(fetch, walk.level))
            walk.advance([children(each) for each in walk.level])
        if walk.beyond:
            reason = f"manifest {walk.beyond[0].digest}: {BEYOND_LIMITS}"
            raise ManifestInvalid(self._repository.registry, reason)
        for each in walk.children_first():
            if each.digest not in image.manifests:
                image.manifests[each.digest] = holders[each.digest]

    def _check_platforms(self, image: UpstreamImage, top: ManifestHolder) -> None:
        manifest = self._parse(top)
        if not isinstance(manifest, Index) or (manifest.blobs and not manifest.children):
            return
        image.lacking = lacking_in(manifest, self._wanted.platforms)
        if self._wanted.refuses(image.lacking):
            lacking = ", ".join(map(str, image.lacking))
            has = ", ".join(map(str, platforms_of(each.platform for each in manifest.children)))
            raise ManifestUnknown(image.reference, f"lacks {lacking}; it has {has or 'none'}")

    # Referrers

    async def _add_referrers(self, image: UpstreamImage, subject: Digest, *, depth: int) -> None:
        if subject in self._subjects or depth > _MAX_REFERRER_DEPTH:
            return
        self._subjects.add(subject)
        for referrer in await self._referrers_of(image, subject):
            try:
                holder = await self._by_digest(referrer.digest)
            except _NOT_THERE as exc:
                # An upstream may still list a referrer that it has deleted.
                image.refused.append(exc)
                continue
            await self._add(image, holder)
            await self._add_referrers(image, referrer.digest, depth=depth + 1)
        for tag in signature_tags(subject):
            tagged = await self._find_tag(image, tag)
            if tagged is not None:
                await self._add(image, tagged)
                image.tags[tag] = tagged.descriptor

    async def _referrers_of(self, image: UpstreamImage, subject: Digest) -> list[Descriptor]:
        """What the referrers API lists or, at an upstream without it, the index under the
        subject's referrers tag (distribution-spec, referrers tag schema)."""
        found: list[Descriptor] = []
        path, query = f"referrers/{subject}", ""
        asked: set[str] = set()
        try:
            while len(found) < _MAX_REFERRERS:
                listing = await self._request(
                    ("load", self._repository, path, query),
                    lambda backend, query=query: backend.fetch_listing(  # type: ignore[misc]
                        self._repository, path, query
                    ),
                )
                found += self._listed(listing.raw)
                asked.add(query)
                query = listing.next_query
                if not query or query in asked:
                    break
        except NO_SUCH_LISTING:
            tag = referrers_tag(subject)
            tagged = await self._find_tag(image, tag)
            # An image manifest may have such a tag by chance: it lists no referrers.
            if tagged is None or not isinstance(self._parse(tagged), Index):
                return []
            image.manifests[tagged.descriptor.digest] = tagged
            image.tags[tag] = tagged.descriptor
            found = self._listed(tagged.raw)
        return found[:_MAX_REFERRERS]

    def _listed(self, raw: bytes) -> list[Descriptor]:
        try:
            index = parse_manifest(raw, OCI_INDEX)
        except MalformedManifest as exc:
            raise ManifestInvalid(self._repository.registry, f"referrers: {exc}") from exc
        return list(index.manifests) if isinstance(index, Index) else []

    def _parse(self, holder: ManifestHolder) -> Manifest:
        """Raises ManifestInvalid."""
        # `holder.manifest` would keep the parsed document in the store's cache of hot manifests.
        if holder.parsed is not None:
            return holder.parsed
        try:
            return parse_manifest(holder.raw, holder.descriptor.media_type)
        except MalformedManifest as exc:
            reason = f"manifest {holder.descriptor.digest}: {exc}"
            raise ManifestInvalid(self._repository.registry, reason) from exc

    async def _find_tag(self, image: UpstreamImage, tag: str) -> ManifestHolder | None:
        """None where the upstream does not have it, or refuses it although the image is loaded."""
        try:
            return await self._fetch(Reference(self._repository, tag))
        except _NOT_THERE as exc:
            if not isinstance(exc, ManifestUnknown | NameUnknown):
                image.refused.append(exc)
            return None

    # Requests to the upstream

    async def _resolve(self, reference: Reference) -> Descriptor:
        return await self._request(
            ("load resolve", reference), lambda backend: backend.resolve(reference)
        )

    async def _fetch(self, reference: Reference) -> ManifestHolder:
        holder = await self._request(
            ("load", reference), lambda backend: backend.fetch_manifest(reference)
        )
        self._pulls.add(reference)
        return holder

    async def _request(self, key: object, request: Callable[[Backend], T]) -> T:
        return await self._retry.run(
            self._repository.registry,
            self._progress,
            lambda: self._requests.call(self._repository, key, request),
        )


async def all_of(works: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """The results, in order. The first error cancels the other coroutines, and is raised as it is
    once all of them have ended."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
