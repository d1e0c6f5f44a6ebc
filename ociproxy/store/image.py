"""What the store has of an image and what the image lacks.

This module decides whether a stored image is complete; `extract` does for what is imported. An
index may be *sparse*: a child that is not stored is no gap unless the caller asked for its
platform. What is stored must be whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ociproxy.oci.descriptor import (
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    MalformedManifest,
    OddManifest,
)
from ociproxy.oci.image import (
    BEYOND_LIMITS,
    ImageWalk,
    attested,
    choose,
    is_attestation,
    platform_of,
    platforms_of,
)
from ociproxy.oci.manifest import ImageManifest, Index
from ociproxy.store.look import Look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class ReachedImage:
    """A stored manifest that is no index: an image manifest, or a document of another kind.

    `platform` is None where neither an index nor the image's config names one.
    """

    platform: Platform | None
    digest: Digest
    complete: bool


@dataclass(frozen=True, slots=True)
class Missing:
    """Content that a complete image would have; `reason` says what is wrong with it."""

    descriptor: Descriptor
    reason: str
    is_blob: bool = False

    def __str__(self) -> str:
        return f"{self.descriptor.digest} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest as a referrers list shows it, and the digest of its subject."""

    descriptor: Descriptor
    subject: Digest


@dataclass(slots=True)
class ImageContents:
    """What is stored of an image: manifests, parents first, and the bytes of each blob."""

    top: Descriptor
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    configs: set[Digest] = field(default_factory=set)
    """Digests of the configs of all images, stored or not."""
    others: set[Digest] = field(default_factory=set)
    """Manifests of kinds of which only the bytes are known, not which blobs they need."""
    images: list[ReachedImage] = field(default_factory=list)
    referrers: dict[Digest, Referrer] = field(default_factory=dict)
    """Those of `manifests` that were reached from their subject."""
    missing: dict[Digest, Missing] = field(default_factory=dict)
    unstored: dict[Digest, Descriptor] = field(default_factory=dict)
    """Children that an index lists and the store lacks, for any platform: a sparse index is
    complete without them."""
    unstored_attestations: list[Descriptor] = field(default_factory=list)
    """Attestations that an index lists of its stored images. An image is complete without them,
    but Docker from 29.1 on pulls them with it."""
    used: float = 0.0
    """The newest use of a manifest or blob that is stored, in seconds since the epoch."""

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def size(self) -> int:
        """Bytes stored, each blob counted once."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[Digest, int]:
        """Bytes of each manifest and blob that is stored."""
        return {each.digest: each.size for each in self.manifests.values()} | self.blobs

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """Of the complete images."""
        return platforms_of(each.platform for each in self.images if each.complete)


def read_contents(
    store: Store,
    repository: Repository,
    top: Descriptor,
    platforms: Sequence[Platform] = (),
    *,
    referrers: bool = False,
    look: Look | None = None,
    isolated: bool = False,
) -> ImageContents:
    """Read what the store has of an image, and record no use of it.

    Without `platforms`, every stored child of an index is read, and an index of images must have
    at least one. With them, an index must have its children for these platforms, and only these
    and their stored attestations are read. `referrers` adds what this repository has stored that
    refers to a manifest reached. A caller that reads many images gives the same `look`. If
    repositories are `isolated`, a manifest is missing that is stored for others only. Raises
    StoreError.
    """
    contents = ImageContents(top)
    given = tuple(platforms)
    reading = _Reading(store, look or Look(store), repository, contents, given, isolated=isolated)
    reading.run(top)
    if referrers:
        reading.add_referrers()
    return reading.contents


class _Reading:
    def __init__(
        self,
        store: Store,
        look: Look,
        repository: Repository,
        contents: ImageContents,
        platforms: tuple[Platform, ...],
        *,
        isolated: bool,
    ) -> None:
        self._isolated = isolated
        self._store = store
        self._look = look
        self._repository = repository
        self._platforms = platforms
        self.contents = contents

    def run(self, top: Descriptor) -> None:
        walk = ImageWalk(top)
        while walk.level:
            walk.advance([self._visit(each) for each in walk.level])
        for descriptor in walk.beyond:
            self._miss(descriptor, BEYOND_LIMITS)

    def add_referrers(self) -> None:
        """Add referrers of referrers too: a signature may refer to a bill of materials."""
        subjects = list(self.contents.manifests)
        for subject in subjects:
            for referrer in self._look.referrers(self._repository, subject):
                digest = referrer.digest
                # The record of a referrer may be left when its manifest is gone.
                if digest not in self.contents.manifests and self._is_stored(referrer):
                    self.run(referrer)
                    self.contents.referrers[digest] = Referrer(referrer, subject)
                    subjects.append(digest)

    def _visit(self, descriptor: Descriptor) -> Sequence[Descriptor]:
        """Add one manifest to the contents. Returns the children to go on with."""
        if descriptor.digest in self.contents.manifests:
            return ()
        found = self._look.manifest(descriptor)
        if found is None:
            reason = self._look.lost.get(descriptor.digest, "manifest not stored")
            self._miss(descriptor, reason)
            return ()
        self.contents.manifests[descriptor.digest] = found.descriptor
        self.contents.used = max(self.contents.used, found.used)
        refs = self._store.refs
        if self._isolated and refs.find_manifest(self._repository, descriptor.digest) is None:
            self._miss(descriptor, "stored under another repository only")
        try:
            manifest = found.manifest
        except OddManifest as exc:
            self._miss(descriptor, f"what it consists of cannot be told: {exc}")
            self.contents.others.add(descriptor.digest)
            return ()
        except MalformedManifest as exc:
            self._miss(descriptor, f"not the manifest it is called: {exc}")
            self.contents.others.add(descriptor.digest)
            return ()
        if found.descriptor.media_type in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
            self._miss(descriptor, "it has Docker's schema 1, whose layers are not looked for")
        config = manifest.config.digest if isinstance(manifest, ImageManifest) else None
        complete = self._add_blobs(manifest.blobs, config)
        if isinstance(manifest, Index) and (manifest.children or not manifest.blobs):
            return self._children(manifest)
        platform = descriptor.platform
        if isinstance(manifest, ImageManifest):
            platform = platform or platform_of(self._store.blobs.peek(manifest.config.digest))
        else:
            self.contents.others.add(descriptor.digest)
        self.contents.images.append(ReachedImage(platform, descriptor.digest, complete))
        return ()

    def _children(self, index: Index) -> list[Descriptor]:
        chosen = choose(index, self._platforms, attestations=True)
        stored = {child.digest for child in chosen if self._is_stored(child)}
        images = [child for child in chosen if not is_attestation(child)]
        absent = [child for child in images if child.digest not in stored]
        if self._platforms or len(absent) == len(images):
            for child in absent:
                self._miss(child, f"{child.platform or 'platform unknown'} not stored")
        for child in chosen if self._look.lost else ():
            if child.digest in self._look.lost:  # it is stored, so it should be whole
                self._miss(child, self._look.lost[child.digest])
        if self._platforms and not images and index.children:
            wanted = ", ".join(map(str, self._platforms))
            self._miss(self.contents.top, f"the index offers nothing for {wanted}")
        lacking = (child for child in chosen if child.digest not in stored)
        self.contents.unstored.update((child.digest, child) for child in lacking)
        subjects = {str(child.digest) for child in images if child.digest in stored}
        self.contents.unstored_attestations += [
            child
            for child in chosen
            if child.digest not in stored and is_attestation(child) and attested(child) in subjects
        ]
        return [child for child in chosen if child.digest in stored]

    def _add_blobs(self, blobs: Sequence[Descriptor], config: Digest | None) -> bool:
        """Whether all of them are stored in the right size."""
        complete = True
        if config is not None:
            self.contents.configs.add(config)
        for blob in blobs:
            found = self._look.blob(blob.digest)
            size = None if found is None else found[0]
            if found is not None and found[1] > self.contents.used:
                self.contents.used = found[1]
            if size == blob.size:
                self.contents.blobs[blob.digest] = size
                continue
            complete = False
            reason = "not stored" if size is None else f"{size} bytes stored of {blob.size}"
            role = "config" if blob.digest == config else "layer" if config else "blob"
            if blob.is_nondistributable:
                role = f"non-distributable {role}"
            self._miss(blob, f"{role} {reason}", is_blob=True)
        return complete

    def _is_stored(self, descriptor: Descriptor) -> bool:
        return self._look.manifest(descriptor) is not None

    def _miss(self, descriptor: Descriptor, reason: str, *, is_blob: bool = False) -> None:
        self.contents.missing[descriptor.digest] = Missing(descriptor, reason, is_blob)
