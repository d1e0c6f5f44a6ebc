"""Content below the store's own files that is only read, such as a bundle's.

The store looks at its own files first, then at each content below, in order. It writes only its own
files.

Tests: tests/archive/test_bundle.py, tests/store/test_blobs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.store.refs import Records


@dataclass(frozen=True, slots=True)
class BlobFile:
    """An open stored blob, which the caller closes. Pruning does not harm an open one.

    Its `size` bytes begin at `offset` of the file. `content` is the content below the store that
    the file belongs to; None for the store's own file.
    """

    file: FileIO
    size: int
    sealed: bool
    """Whether the blob was verified, and the file not written to since. Else verify it before
    serving."""
    offset: int = 0
    content: ReadOnlyContent | None = None


class ReadOnlyContent(Protocol):
    """Safe to use from several threads."""

    @property
    def records(self) -> Records: ...

    @property
    def origin(self) -> object:
        """Equal for what came together, such as the volumes of one archive."""
        ...

    def find_blob(self, digest: Digest) -> BlobFile | None:
        """Open a blob, which the caller closes; `sealed` once `verify_blob` has returned for it."""
        ...

    def find_blob_size(self, digest: Digest) -> int | None: ...

    def verify_blob(self, digest: Digest) -> None:
        """Hash a blob; blocks for its length. Raises DigestMismatch for wrong bytes: `find_blob`
        does not find that blob any more."""
        ...

    def find_manifest(self, digest: Digest) -> ManifestHolder | None:
        """A manifest whose bytes match the digest; None also if they do not."""
        ...
