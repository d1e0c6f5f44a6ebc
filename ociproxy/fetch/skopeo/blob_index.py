"""Which image a blob is copied with: skopeo copies images and cannot fetch a single blob.

Tests: tests/fetch/skopeo/test_backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import BlobUnknown
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import ImageManifest
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_KNOWN: Final = 16_384
"""Blobs of all images that are kept in memory. The others are looked up in the store."""
_SEARCHED: Final = 4096
"""Stored manifests of a repository that one look-up of a blob reads at most."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image manifest of a repository, and the blobs that the registry holds for it."""

    repository: Repository
    descriptor: Descriptor
    blobs: tuple[Descriptor, ...]

    @property
    def key(self) -> tuple[Repository, Digest]:
        return self.repository, self.descriptor.digest

    def missing(self, store: Store) -> dict[Digest, Descriptor]:
        """The blobs that are not in the store."""
        find_size = store.blobs.find_size
        return {blob.digest: blob for blob in self.blobs if find_size(blob.digest) is None}


class BlobIndex:
    """The image of each known blob. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: BoundedCache[tuple[Repository, Digest], tuple[Image, int]] = BoundedCache(
            _KNOWN
        )

    def learn(self, repository: Repository, holder: ManifestHolder) -> None:
        """Remember the blobs of a manifest."""
        try:
            manifest = holder.manifest
        except MalformedManifest:
            return
        if isinstance(manifest, ImageManifest):
            image = Image(repository, holder.descriptor, manifest.blobs)
            for blob in image.blobs:
                self._known.put((repository, blob.digest), (image, blob.size))

    def get(self, repository: Repository, digest: Digest) -> tuple[Image, int]:
        """An image of this repository that has the blob, and the blob's size in bytes. Raises
        BlobUnknown or StoreError."""
        known = self._known.get((repository, digest))
        if known is not None:
            return known
        for each in self._store.refs.manifests(repository)[:_SEARCHED]:
            described = self._store.refs.find_manifest(repository, each)
            holder = self._store.manifests.find(each, use=False)
            if holder is not None:
                self.learn(repository, with_media_type(holder, described))
                known = self._known.get((repository, digest))
                if known is not None:
                    return known
        reason = f"skopeo copies images, and no manifest pulled from {repository} names it"
        raise BlobUnknown(digest, reason)
