"""All that an image in the store consists of, and what it lacks: the one place that knows whether
an image is complete.

An index may be *sparse*: a child that nobody stored is no gap unless its platform was asked for.
What is stored must be whole.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ImageManifest, Index
from ociproxy.oci.media_types import is_generic
from ociproxy.oci.platform import Platform, choose, is_attestation
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_MAX_MANIFESTS: Final = 20_000
"""Of one image: a guard against hostile documents, as the count of an index's children is."""


@dataclass(frozen=True, slots=True)
class ReachedImage:
    """An image manifest, or another that stands by itself; None where nothing says what for."""

    platform: Platform | None
    digest: Digest
    complete: bool


@dataclass(frozen=True, slots=True)
class Missing:
    """Content that a complete image would have; `reason` says what is wrong with it."""

    descriptor: Descriptor
    reason: str

    def __str__(self) -> str:
        return f"{self.descriptor.digest} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest as a referrers list shows it, and what it refers to."""

    descriptor: Descriptor
    subject: Digest


@dataclass(slots=True)
class Closure:
    """What is stored of an image: manifests, parents first, and the bytes of each blob."""

    top: Descriptor
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    configs: set[Digest] = field(default_factory=set)
    """Those of `blobs` that are configs."""
    images: list[ReachedImage] = field(default_factory=list)
    referrers: dict[Digest, Referrer] = field(default_factory=dict)
    """Those of `manifests` that are there because they refer to another one."""
    missing: dict[Digest, Missing] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def size(self) -> int:
        """Stored bytes, each blob once."""
        return sum(each.size for each in self.manifests.values()) + sum(self.blobs.values())

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """Of the complete images, in order."""
        found = (each.platform for each in self.images if each.complete)
        return tuple(sorted({place.normalised() for place in found if place}, key=str))


def closure(
    store: Store,
    repository: Repository,
    top: Descriptor,
    platforms: Sequence[Platform] = (),
    *,
    referrers: bool = False,
) -> Closure:
    """Walk what a manifest reaches, recording no use.

    With platforms their children of an index must be stored, and nothing but these and their
    stored attestations is walked; without, whatever is stored, which has to be something.
    `referrers` takes in what this repository has stored that refers to a manifest reached.
    """
    walk = _Walk(store, repository, Closure(top), tuple(platforms))
    walk.run(top)
    if referrers:
        walk.add_referrers()
    return walk.closure


class _Walk:
    """One walk; breadth first, so that parents come before their children."""

    def __init__(
        self,
        store: Store,
        repository: Repository,
        closure: Closure,
        platforms: tuple[Platform, ...],
    ) -> None:
        self._store = store
        self._repository = repository
        self._platforms = platforms
        self.closure = closure

    def run(self, top: Descriptor) -> None:
        waiting = deque([top])
        while waiting and len(self.closure.manifests) < _MAX_MANIFESTS:
            waiting.extend(self._visit(waiting.popleft()))
        for descriptor in waiting:
            self._miss(descriptor, f"the image has more than {_MAX_MANIFESTS} manifests")

    def add_referrers(self) -> None:
        """Also what refers to a referrer, as a signature does to a bill of materials."""
        subjects = deque(self.closure.manifests)
        while subjects:
            subject = subjects.popleft()
            for referrer in self._store.refs.referrers(self._repository, subject):
                digest = referrer.digest
                # Records outlive what they speak of.
                if digest not in self.closure.manifests and self._is_stored(referrer):
                    self.run(referrer)
                    self.closure.referrers[digest] = Referrer(referrer, subject)
                    subjects.append(digest)

    def _visit(self, descriptor: Descriptor) -> Iterable[Descriptor]:
        """Take in one manifest; returns the children to go on with."""
        if descriptor.digest in self.closure.manifests:
            return ()
        found = self._store.manifests.find(descriptor.digest, use=False)
        if found is None:
            self._miss(descriptor, "manifest not stored")
            return ()
        holder = with_media_type(found, descriptor)
        self.closure.manifests[descriptor.digest] = holder.descriptor
        try:
            manifest = holder.manifest
        except MalformedManifest as exc:
            self._miss(descriptor, f"not the manifest it is called: {exc}")
            return ()
        if isinstance(manifest, Index):
            return self._children(manifest)
        if isinstance(manifest, ImageManifest):
            self._image(descriptor, holder, manifest)
        else:
            self.closure.images.append(
                ReachedImage(descriptor.platform, descriptor.digest, complete=True)
            )
        return ()

    def _children(self, index: Index) -> list[Descriptor]:
        chosen = choose(index, self._platforms, attestations=True)
        stored = [child for child in chosen if self._is_stored(child)]
        images = [child for child in chosen if not is_attestation(child)]
        if self._platforms:
            absent = [child for child in images if not self._is_stored(child)]
            for child in absent:
                self._miss(child, f"{child.platform or 'platform unknown'} not stored")
            if not images and index.manifests:
                wanted = ", ".join(map(str, self._platforms))
                self._miss(self.closure.top, f"the index offers nothing for {wanted}")
        elif images and not any(map(self._is_stored, images)):
            for child in images:
                self._miss(child, f"{child.platform or 'platform unknown'} not stored")
        return stored

    def _image(
        self, descriptor: Descriptor, holder: ManifestHolder, manifest: ImageManifest
    ) -> None:
        complete = True
        self.closure.configs.add(manifest.config.digest)
        for blob in manifest.blobs:
            size = self._store.blobs.find_size(blob.digest)
            if size == blob.size:
                self.closure.blobs[blob.digest] = size
                continue
            complete = False
            reason = "not stored" if size is None else f"{size} bytes stored of {blob.size}"
            role = "config" if blob.digest == manifest.config.digest else "layer"
            self._miss(blob, f"{role} {reason}")
        platform = descriptor.platform or platform_of(self._store, manifest)
        self.closure.images.append(ReachedImage(platform, holder.descriptor.digest, complete))

    def _is_stored(self, descriptor: Descriptor) -> bool:
        return self._store.manifests.find(descriptor.digest, use=False) is not None

    def _miss(self, descriptor: Descriptor, reason: str) -> None:
        self.closure.missing[descriptor.digest] = Missing(descriptor, reason)


def roots(store: Store, repository: Repository) -> Iterator[Descriptor]:
    """Stored manifests of a repository that neither its tags nor other manifests lead to, by
    digest: images that were asked for in this way, or whose tag has moved.

    A referrer belongs to its subject where that is stored too.
    """
    tags = (store.refs.find_tag(repository, tag) for tag in store.refs.tags(repository))
    led_to: set[Digest] = set()
    for record in tags:
        if record is not None:
            led_to.add(record.descriptor.digest)
            led_to.update(_below(store, record.descriptor))
    loose: dict[Digest, Descriptor] = {}
    for digest in store.refs.manifests(repository):
        described = store.refs.find_manifest(repository, digest)
        if described is None or digest in led_to:
            continue
        found = store.manifests.find(digest, use=False)
        if found is None:
            continue
        led_to.update(_below(store, described))
        if not _is_referrer(store, with_media_type(found, described)):
            loose[digest] = described
    yield from (each for digest, each in loose.items() if digest not in led_to)


def _below(store: Store, descriptor: Descriptor) -> set[Digest]:
    """The digests that an index leads to, by way of other indexes too."""
    below: set[Digest] = set()
    waiting = [descriptor]
    while waiting and len(below) < _MAX_MANIFESTS:
        each = waiting.pop()
        found = store.manifests.find(each.digest, use=False)
        if found is None:
            continue
        try:
            manifest = with_media_type(found, each).manifest
        except MalformedManifest:
            continue
        if isinstance(manifest, Index):
            fresh = [child for child in manifest.manifests if child.digest not in below]
            below.update(child.digest for child in fresh)
            waiting.extend(c for c in fresh if c.is_index or is_generic(c.media_type))
    return below


def _is_referrer(store: Store, holder: ManifestHolder) -> bool:
    try:
        subject = holder.manifest.subject
    except MalformedManifest:
        return False
    return subject is not None and store.manifests.find(subject.digest, use=False) is not None


def platform_of(store: Store, manifest: ImageManifest) -> Platform | None:
    """What the image's config says (image-spec config.md); None where it is not stored or says
    nothing."""
    if manifest.config.size > MANIFEST_MAX_SIZE:
        return None
    try:
        document = json.loads(store.blobs.path(manifest.config.digest).read_bytes())
        parts = document["os"], document["architecture"], document.get("variant", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # A config may hold anything: it is whatever somebody pushed.
    return Platform(*parts) if all(isinstance(part, str) for part in parts) else None
