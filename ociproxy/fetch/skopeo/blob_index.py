"""Which image a blob is copied with: skopeo copies images, and knows no blobs by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.oci.manifest import ImageManifest, MalformedManifest
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Descriptor, ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_KNOWN: Final = 16_384
"""Blobs, of any image, that are remembered; the store knows the others."""
_SEARCHED: Final = 4096
"""Stored manifests of a repository that are looked through for a blob that is not remembered."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image manifest of a repository, and the blobs that a registry holds for it."""

    repository: Repository
    descriptor: Descriptor
    blobs: tuple[Descriptor, ...]

    @property
    def key(self) -> tuple[Repository, Digest]:
        return self.repository, self.descriptor.digest

    def find(self, digest: Digest) -> Descriptor | None:
        return next((blob for blob in self.blobs if blob.digest == digest), None)


class BlobIndex:
    """Thread-safe. Two threads that look for the same may both read the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of: BoundedCache[tuple[Repository, Digest], Image] = BoundedCache(_KNOWN)

    def learn(self, repository: Repository, holder: ManifestHolder) -> None:
        """A manifest that the upstream has just sent, or that is stored."""
        try:
            manifest = holder.manifest
        except MalformedManifest:
            return
        if isinstance(manifest, ImageManifest):
            image = Image(repository, holder.descriptor, manifest.blobs)
            for blob in image.blobs:
                self._of.put((repository, blob.digest), image)

    def find(self, repository: Repository, digest: Digest) -> Image | None:
        """The image of this repository that has this blob. Raises StoreError."""
        known = self._of.get((repository, digest))
        if known is not None:
            return known
        for each in self._store.refs.manifests(repository)[:_SEARCHED]:
            described = self._store.refs.find_manifest(repository, each)
            holder = self._store.manifests.find(each, use=False)
            if holder is not None:
                self.learn(repository, with_media_type(holder, described))
                found = self._of.get((repository, digest))
                if found is not None:
                    return found
        return None
