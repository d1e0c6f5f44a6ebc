"""Which image a blob is copied with: skopeo copies images and cannot fetch a single blob.

Tests: tests/fetch/skopeo/test_backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
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

    def find(self, digest: Digest) -> Descriptor | None:
        return next((blob for blob in self.blobs if blob.digest == digest), None)

    def missing(self, store: Store) -> dict[Digest, Descriptor]:
        """The blobs that are not in the store."""
        find_size = store.blobs.find_size
        return {blob.digest: blob for blob in self.blobs if find_size(blob.digest) is None}


class BlobIndex:
    """The image of each known blob. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._image_of: BoundedCache[tuple[Repository, Digest], Image] = BoundedCache(_KNOWN)

    def learn(self, repository: Repository, holder: ManifestHolder) -> None:
        """Remember the blobs of a manifest."""
        try:
            manifest = holder.manifest
        except MalformedManifest:
            return
        if isinstance(manifest, ImageManifest):
            image = Image(repository, holder.descriptor, manifest.blobs)
            for blob in image.blobs:
                self._image_of.put((repository, blob.digest), image)

    def find(self, repository: Repository, digest: Digest) -> Image | None:
        """An image of this repository that has this blob. Raises StoreError."""
        known = self._image_of.get((repository, digest))
        if known is not None:
            return known
        for each in self._store.refs.manifests(repository)[:_SEARCHED]:
            described = self._store.refs.find_manifest(repository, each)
            holder = self._store.manifests.find(each, use=False)
            if holder is not None:
                self.learn(repository, with_media_type(holder, described))
                found = self._image_of.get((repository, digest))
                if found is not None:
                    return found
        return None
