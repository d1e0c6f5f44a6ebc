"""Content below the store's own files that is only read, such as a bundle's.

The store looks at its own files first, then at what lies below them, in order. It writes only its
own files.

Tests: tests/archive/test_bundle.py, tests/store/test_blobs.py, tests/store/test_refs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository


@dataclass(frozen=True, slots=True)
class TagRecord:
    """What a tag resolved to, when (seconds since the epoch), and at which upstream."""

    descriptor: Descriptor
    resolved: float
    upstream: str


@dataclass(frozen=True, slots=True)
class Records:
    """The records of content below the store: tags and manifests by repository, referrers by
    subject."""

    tags: dict[Repository, dict[str, TagRecord]] = field(default_factory=dict)
    manifests: dict[Repository, dict[Digest, Descriptor]] = field(default_factory=dict)
    referrers: dict[Digest, dict[Digest, Descriptor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlobFile:
    """An open stored blob, which the caller closes. Pruning does not harm an open one.

    Its bytes begin at `offset` of the file. `content` is what lies below the store, where the file
    is not the store's own.
    """

    file: FileIO
    size: int
    sealed: bool
    """False where the file was written to since it was verified: verify it before serving."""
    offset: int = 0
    content: ReadOnlyContent | None = None


class ReadOnlyContent(Protocol):
    """Safe to use from several threads."""

    @property
    def records(self) -> Records: ...

    def find_blob(self, digest: Digest) -> BlobFile | None:
        """Open, and `sealed` only once it was verified; the caller closes it."""
        ...

    def find_blob_size(self, digest: Digest) -> int | None: ...

    def verify_blob(self, digest: Digest) -> None:
        """Blocks for the length of the blob. Raises DigestMismatch for a blob that is not found
        any more then."""
        ...

    def find_manifest(self, digest: Digest) -> ManifestHolder | None:
        """Its bytes match its digest; None also where they do not."""
        ...
