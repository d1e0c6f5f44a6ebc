"""`load --plan`: how much a load would fetch, and how much room there is. Nothing is stored.

Tests: tests/load/test_loader.py.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.load.image import UpstreamImage
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.oci.reference import Reference


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """`size` is the bytes of the image, `new` those of its blobs that the store lacks."""

    reference: Reference
    digest: Digest
    platforms: tuple[Platform, ...]
    lacking: tuple[Platform, ...]
    size: int
    new: int


class Plan:
    """The images of a load. Their manifests are not kept: a list may name thousands."""

    def __init__(self) -> None:
        self._images: list[PlannedImage] = []
        self._sizes: dict[Digest, int] = {}
        self._missing: dict[Digest, int] = {}

    def add(self, image: UpstreamImage, missing: dict[Digest, int]) -> None:
        """`missing` has the bytes of each blob of the image that the store lacks."""
        digest, new = image.top.descriptor.digest, sum(missing.values())
        self._images.append(
            PlannedImage(image.reference, digest, image.platforms, image.lacking, image.size, new)
        )
        self._sizes.update((blob.digest, blob.size) for blob in image.blobs.values())
        self._missing.update(missing)

    @property
    def images(self) -> list[PlannedImage]:
        return sorted(self._images, key=lambda image: str(image.reference))

    @property
    def size(self) -> int:
        """Bytes of all blobs; a blob that images share is counted once."""
        return sum(self._sizes.values())

    @property
    def new(self) -> int:
        """Bytes of all blobs that the store lacks, each counted once."""
        return sum(self._missing.values())


def free_space(root: Path) -> int:
    """Bytes that this user may still write where the store is. Raises StoreError."""
    with store_errors(root):
        return shutil.disk_usage(root).free
