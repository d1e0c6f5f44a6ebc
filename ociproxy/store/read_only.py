"""Content below the store's own files that is only read, such as a bundle's; and its records.

The store looks at its own files first, then at each content below, in order. It writes only its own
files. Records say which tags and manifests a repository has, and which manifests refer to which.

Tests: tests/archive/test_bundle.py, tests/store/test_blobs.py, tests/store/test_refs.py.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.errors import DigestInvalid
from ociproxy.oci.descriptor import Descriptor, text_in
from ociproxy.oci.digest import Digest

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository

_LEFT: Final = 64
"""Manifests that a tag meant before: of one that moves daily, two months."""


@dataclass(frozen=True, slots=True)
class TagRecord:
    """The manifest that a tag meant at this upstream; `resolved` is seconds since the epoch. `left`
    are the manifests that it meant before, the newest first."""

    descriptor: Descriptor
    resolved: float
    upstream: str
    left: tuple[Digest, ...] = ()

    @staticmethod
    def from_json(document: dict[str, object]) -> TagRecord | None:
        """None for a damaged one."""
        try:
            descriptor = Descriptor.from_json(document.get("descriptor"))
            resolved = datetime.fromisoformat(text_in(document.get("resolved"))).timestamp()
        except ValueError:  # MalformedManifest is one
            return None
        left = document.get("left")
        digests: list[Digest] = []
        for each in left if isinstance(left, list) else ():
            with suppress(DigestInvalid):
                digests.append(Digest.parse(str(each)))
        upstream = str(document.get("upstream", ""))
        return TagRecord(descriptor, resolved, upstream, tuple(digests))

    def to_json(self) -> dict[str, object]:
        when = datetime.fromtimestamp(self.resolved, UTC)
        return {
            "descriptor": self.descriptor.to_json(),
            "resolved": when.isoformat(timespec="milliseconds"),
            "upstream": self.upstream,
            **({"left": list(map(str, self.left))} if self.left else {}),
        }

    def after(self, before: TagRecord | None) -> TagRecord:
        """This record in the place of another one, whose manifest it remembers."""
        left = () if before is None else (before.descriptor.digest, *before.left)
        moved = dict.fromkeys(each for each in left if each != self.descriptor.digest)
        return replace(self, left=tuple(moved)[:_LEFT])


@dataclass(frozen=True, slots=True)
class Records:
    """Tags by repository and tag, manifests by repository and digest, referrers by subject and
    digest."""

    tags: dict[Repository, dict[str, TagRecord]] = field(default_factory=dict)
    manifests: dict[Repository, dict[Digest, Descriptor]] = field(default_factory=dict)
    referrers: dict[Digest, dict[Digest, Descriptor]] = field(default_factory=dict)


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
