"""Which image a blob is copied with, the OCI layout that skopeo writes that image into, and the
store's way of emptying it. skopeo copies images and cannot fetch a single blob.

Blobs that the store has are in the layout as hard links before skopeo starts, so skopeo does not
fetch them. A blob enters the store as soon as it is whole, the manifest once skopeo has ended. Of
the layout only these files are read: each is verified by its descriptor, the index is not needed.

Tests: tests/fetch/skopeo/test_backend.py, test_image_layout.py.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import (
    BlobUnknown,
    StoreFull,
    UpstreamUnavailable,
)
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.layout import blob_path
from ociproxy.oci.manifest import ImageManifest, ManifestHolder
from ociproxy.store.files import store_errors
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from pathlib import Path
    from threading import Event

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.room import Room
    from ociproxy.store.store import Store


_KNOWN: Final = 16_384
"""Blobs of all images that are kept in memory. The others are looked up in the store."""
_SEARCHED: Final = 4096
"""Stored manifests of a repository that one look-up of a blob reads at most."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image manifest of a repository, and the blobs that skopeo copies: those without `urls`."""

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
    """The image of each known blob, and why skopeo does not bring some. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: BoundedCache[tuple[Repository, Digest], tuple[Image, int]] = BoundedCache(
            _KNOWN
        )
        self._refused: BoundedCache[tuple[Repository, Digest], str] = BoundedCache(_KNOWN)
        """Why skopeo does not bring a blob, for those that a manifest names."""

    def learn(self, repository: Repository, holder: ManifestHolder) -> None:
        """Remember the blobs of a manifest."""
        try:
            manifest = holder.manifest
        except MalformedManifest:
            return
        if not isinstance(manifest, ImageManifest):
            for blob in manifest.blobs:
                reason = f"no blobs of {holder.descriptor.media_type}"
                self._refused.put((repository, blob.digest), reason)
            return
        blobs = tuple(blob for blob in manifest.blobs if not blob.urls)
        image = Image(repository, holder.descriptor, blobs)
        for blob in manifest.blobs:
            if blob.urls:
                self._refused.put((repository, blob.digest), "no layers that have URLs")
            else:
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
        why = self._refused.get((repository, digest))
        unnamed = f"no blob that no manifest pulled from {repository} names"
        raise BlobUnknown(digest, f"skopeo brings {why or unnamed}: use the backend oras")


_TEMPORARY: Final = "oci-put-blob*"
"""skopeo's names for blobs that are arriving."""


class ImageLayout:
    """One image's layout at `path`, in a folder that no other process uses."""

    def __init__(self, image: Image, path: Path, store: Store) -> None:
        self.path = path
        self._image = image
        self._store = store

    def prepare(self) -> None:
        """A layout that holds the stored blobs and nothing else. Raises StoreError."""
        with store_errors(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)
        for blob in self._image.blobs:
            link = self.path / blob_path(blob.digest)
            with store_errors(link):
                link.parent.mkdir(parents=True, exist_ok=True)
            if self._store.blobs.find_size(blob.digest) == blob.size:
                # A file system without hard links costs another fetch of the blob, no more.
                with suppress(OSError):
                    link.hardlink_to(self._store.blobs.path(blob.digest))

    def arriving(self) -> dict[str, int]:
        """The bytes of each blob that skopeo is writing, by its temporary name."""
        sizes = {}
        for path in self.path.glob(_TEMPORARY):
            with suppress(OSError):
                sizes[path.name] = path.stat().st_size
        return sizes

    def collect(self, room: Room, stopped: Event) -> bool:
        """Put into the store what has come; True if that was something. skopeo gives a blob its
        name when all of it is there. Raises SizeMismatch, DigestMismatch, StoreFull where `room`
        has none, or StoreError."""
        brought = False
        for blob in self._image.missing(self._store).values():
            path = self.path / blob_path(blob.digest)
            if not path.is_file():
                continue
            with room.held(blob.size, stopped) as has_room:
                if not has_room:
                    if stopped.is_set():
                        return brought
                    raise StoreFull(self._store.root, f"no room for blob {blob.digest}")
                # The layout keeps the file: skopeo looks there for a layer that occurs twice.
                self._store.blobs.adopt(path, blob)
            brought = True
        return brought

    def publish(self, upstream: str) -> None:
        """Publish the manifest beside its blobs, which were collected; it is durable on return.
        Raises IntegrityError for a manifest that skopeo has changed, UpstreamUnavailable where
        skopeo left something out, or StoreError."""
        top, blobs = self._image.descriptor, self._store.blobs
        path = self.path / blob_path(top.digest)
        if not path.is_file():
            raise UpstreamUnavailable(upstream, f"skopeo left out manifest {top.digest}")
        with store_errors(path), path.open("rb") as file:
            raw = file.read(top.size + 1)
        holder = ManifestHolder.verified(raw, top)
        with self._store.publishing() as commit:
            for blob in self._image.blobs:
                if blobs.find_size(blob.digest) != blob.size:
                    raise UpstreamUnavailable(upstream, f"skopeo left out blob {blob.digest}")
            self._store.put_manifest(self._image.repository, holder, commit)
        commit.wait()
