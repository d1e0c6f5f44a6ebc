"""The OCI layout that skopeo writes one image into, and the store's way of emptying it.

Blobs that the store has are in the layout as hard links before skopeo starts, so skopeo does not
fetch them. A blob enters the store as soon as it is whole, and the image once skopeo has ended.

Tests: tests/fetch/skopeo/test_backend.py.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestMismatch, LayoutInvalid, UpstreamUnavailable
from ociproxy.oci.layout import LayoutDirectory, blob_path
from ociproxy.store.extract import Extractor
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.fetch.skopeo.blob_index import Image
    from ociproxy.store.store import Store

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

    def collect(self) -> bool:
        """Put into the store what has come; True if that was something. skopeo gives a blob its
        name when all of it is there. Raises SizeMismatch, DigestMismatch or StoreError."""
        brought = False
        for blob in self._image.missing(self._store).values():
            path = self.path / blob_path(blob.digest)
            if path.is_file():
                # The layout keeps the file: skopeo looks there for a layer that occurs twice.
                self._store.blobs.adopt(path, blob)
                brought = True
        return brought

    def publish(self, upstream: str) -> None:
        """Verify the layout as a whole, and publish its image. Raises DigestMismatch for a manifest
        that skopeo has changed, and UpstreamUnavailable for a layout that is not of this image."""
        directory = LayoutDirectory(self.path)
        try:
            (named,) = directory.images()
        except (LayoutInvalid, ValueError) as exc:
            reason = f"skopeo wrote no layout of one image: {exc}"
            raise UpstreamUnavailable(upstream, reason) from exc
        top, written = self._image.descriptor, named.descriptor
        if written.digest != top.digest:
            raise DigestMismatch(f"manifest {top.digest} by skopeo", top.digest, written.digest)
        with Extractor(self._store) as extractor:
            extractor.take_layout(directory, top)
            extractor.drain()
            examined = extractor.examine(top)
            if not examined.complete:
                reason = f"skopeo left {'; '.join(map(str, examined.problems))}"
                raise UpstreamUnavailable(upstream, reason)
            extractor.publish(self._image.repository, examined)
