"""What may lie under the store's own files: content that is only read, such as a bundle's.

The store looks at its own files first, then at its layers in their order, and writes only to the
former.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ociproxy.digest import Digest
    from ociproxy.manifest import Descriptor, ManifestHolder
    from ociproxy.reference import Repository
    from ociproxy.store.blobs import BlobFile
    from ociproxy.store.refs import TagRecord


@dataclass(frozen=True, slots=True)
class Records:
    """What a layer knows of tags, of which manifests a repository has, and of referrers by
    subject. Layers of one store add up."""

    tags: dict[Repository, dict[str, TagRecord]] = field(default_factory=dict)
    manifests: dict[Repository, dict[Digest, Descriptor]] = field(default_factory=dict)
    referrers: dict[Digest, dict[Digest, Descriptor]] = field(default_factory=dict)


class Layer(Protocol):
    """Safe to use from several threads."""

    @property
    def records(self) -> Records: ...

    def find_blob(self, digest: Digest) -> BlobFile | None:
        """Open, and `sealed` only once it was verified; whoever got it closes it."""
        ...

    def find_blob_size(self, digest: Digest) -> int | None: ...

    def verify_blob(self, digest: Digest) -> None:
        """Blocks for the length of the blob. Raises DigestMismatch; the layer then lacks it."""
        ...

    def find_manifest(self, digest: Digest) -> ManifestHolder | None:
        """Its bytes match its digest; None also where they do not."""
        ...
