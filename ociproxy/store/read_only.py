"""What may lie under the store's own files: content that is only read, such as a bundle's.

The store looks at its own files first, then at its layers in their order, and writes only to the
former.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.store.records import Records


@dataclass(frozen=True, slots=True)
class BlobFile:
    """An open stored blob; whoever got it closes it. Pruning does not harm an open one.

    Its bytes begin at `offset` of the file. In a `layer` it is not a file of the store's own.
    """

    file: FileIO
    size: int
    sealed: bool
    """False where the file was written to since it was verified: verify it before serving."""
    offset: int = 0
    layer: ReadOnlyContent | None = None


class ReadOnlyContent(Protocol):
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
