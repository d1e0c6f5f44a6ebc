"""What is cached, tag by tag: for `list`, and for whatever must know whether an image is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.manifest import (
    MANIFEST_MAX_SIZE,
    ImageManifest,
    Index,
    MalformedManifest,
)
from ociproxy.platform import Platform
from ociproxy.store.manifests import described_as

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.digest import Digest
    from ociproxy.manifest import Descriptor, ManifestHolder
    from ociproxy.reference import Reference
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class PlatformEntry:
    """One image manifest under a tag; `platform` is `os/architecture[/variant]`, or "" where
    nothing says."""

    platform: str
    digest: Digest
    complete: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached tag. `size` counts the stored bytes it reaches, each blob once; times are epoch
    seconds."""

    reference: Reference
    digest: Digest
    platforms: tuple[PlatformEntry, ...]
    size: int
    resolved: float
    last_used: float | None

    @property
    def complete(self) -> bool:
        """Whether at least one platform is there, and each that is there is whole."""
        return bool(self.platforms) and all(platform.complete for platform in self.platforms)


def inventory(store: Store) -> Iterator[Entry]:
    """Every cached tag in order; reads the store as it goes and records no use."""
    for reference, record in store.refs.walk():
        reached: dict[Digest, int] = {}
        digest = record.descriptor.digest
        platforms = tuple(_platforms(store, record.descriptor, reached))
        yield Entry(
            reference,
            digest,
            platforms,
            sum(reached.values()),
            record.resolved,
            store.manifests.last_used(digest),
        )


def _platforms(
    store: Store, descriptor: Descriptor, reached: dict[Digest, int]
) -> Iterator[PlatformEntry]:
    """The image manifests that are stored below a descriptor; an index may hold indexes."""
    if descriptor.digest in reached:
        return
    found = store.manifests.find(descriptor.digest, use=False)
    if found is None:
        return
    holder = described_as(found, descriptor)
    reached[descriptor.digest] = len(holder.raw)
    try:
        manifest = holder.manifest
    except MalformedManifest:
        return
    if isinstance(manifest, Index):
        for child in manifest.manifests:
            yield from _platforms(store, child, reached)
    elif isinstance(manifest, ImageManifest):
        yield _image(store, descriptor, holder, manifest, reached)
    else:
        yield PlatformEntry("", descriptor.digest, complete=True)


def _image(
    store: Store,
    descriptor: Descriptor,
    holder: ManifestHolder,
    manifest: ImageManifest,
    reached: dict[Digest, int],
) -> PlatformEntry:
    complete = True
    for blob in manifest.blobs:
        size = store.blobs.find_size(blob.digest)
        if size is None:
            complete = False
        else:
            reached[blob.digest] = size
    platform = descriptor.platform or _platform_of(store, manifest)
    return PlatformEntry(str(platform or ""), holder.descriptor.digest, complete)


def _platform_of(store: Store, manifest: ImageManifest) -> Platform | None:
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
