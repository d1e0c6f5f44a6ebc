"""One look at a store by one run: what it has read it does not read or parse again, while there is
room. A run that wants to know what has changed since takes another look.

Tests: tests/store/test_image.py, tests/store/test_inventory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Manifest
    from ociproxy.store.store import Store

_MANIFESTS: Final = 8 * 1024 * 1024
"""Bytes of the manifests that are remembered; parsed they take some five times as much memory."""
_OVERHEAD: Final = 256
_BLOBS: Final = 65536
"""Blobs whose sizes are remembered: images share them."""


@dataclass(frozen=True, slots=True)
class SeenManifest:
    """A stored manifest under the media type it is described with; `used` is its last use in
    seconds since the epoch, 0 if unknown."""

    descriptor: Descriptor
    parsed: Manifest | MalformedManifest
    used: float

    @property
    def manifest(self) -> Manifest:
        """Raises MalformedManifest."""
        if isinstance(self.parsed, MalformedManifest):
            raise self.parsed
        return self.parsed


class Look:
    """Records no use. Belongs to one thread."""

    def __init__(self, store: Store) -> None:
        self._find_manifest = store.manifests.look
        self._find_blob = store.blobs.look
        self._manifests: BoundedCache[tuple[Digest, str], SeenManifest] = BoundedCache(_MANIFESTS)
        self._blobs: BoundedCache[Digest, tuple[int, float]] = BoundedCache(_BLOBS)

    def manifest(self, described: Descriptor) -> SeenManifest | None:
        """A stored manifest; None also if its bytes do not match the digest. Raises StoreError."""
        digest = described.digest
        key = digest, described.media_type
        seen = self._manifests.get(key)
        if seen is not None:
            return seen
        found = self._find_manifest(digest)
        if found is None:
            return None
        holder, used = found
        holder = with_media_type(holder, described)
        parsed: Manifest | MalformedManifest
        try:
            parsed = holder.manifest
        except MalformedManifest as exc:
            parsed = exc.with_traceback(None)
        seen = SeenManifest(holder.descriptor, parsed, used)
        self._manifests.put(key, seen, len(holder.raw) + _OVERHEAD)
        return seen

    def blob(self, digest: Digest) -> tuple[int, float] | None:
        """Bytes of a stored blob, and its last use. Raises StoreError."""
        seen = self._blobs.get(digest)
        if seen is None:
            seen = self._find_blob(digest)
            if seen is not None:
                self._blobs.put(digest, seen)
        return seen
