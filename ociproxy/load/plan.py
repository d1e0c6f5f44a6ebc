"""`load --plan`: how much a load would fetch, how much room there is, and what it takes of the
upstreams' quotas. Nothing is stored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ociproxy.fetch.backend import Quota
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


@dataclass(frozen=True, slots=True)
class PlannedPulls:
    """What a load needs of one registry's quota, and what that registry said last of it: pulls
    that remain of `limit` in `window` seconds, None if not said."""

    registry: str
    needed: int
    remaining: int
    limit: int
    window: int | None


class Plan:
    """The images of a load. Their manifests are not kept: a list may name thousands."""

    def __init__(self) -> None:
        self._images: list[PlannedImage] = []
        self._sizes: dict[Digest, int] = {}
        self._missing: dict[Digest, int] = {}
        self._pulls: set[Reference] = set()

    def add(self, image: UpstreamImage, missing: dict[Digest, int]) -> None:
        """`missing` has the bytes of each blob of the image that the store lacks."""
        digest, new = image.top.descriptor.digest, sum(missing.values())
        self._images.append(
            PlannedImage(image.reference, digest, image.platforms, image.lacking, image.size, new)
        )
        self._sizes.update((blob.digest, blob.size) for blob in image.blobs.values())
        self._missing.update(missing)
        self._pulls |= image.pulls

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

    def pulls(self, quotas: Mapping[str, Quota]) -> list[PlannedPulls]:
        """One for each registry that has a quota and is needed."""
        needed = Counter(each.repository.registry for each in self._pulls)
        return [
            PlannedPulls(registry, needed[registry], quota.remaining, quota.limit, quota.window)
            for registry, quota in sorted(quotas.items())
            if needed[registry]
        ]
