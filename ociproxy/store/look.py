"""One look at a store by one run: what it has read it does not read or parse again, while there is
room. A run that wants to know what has changed since takes another look.

Tests: tests/store/test_image.py, tests/store/test_inventory.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, ParamSpec, TypeVar

from ociproxy.bounded import BoundedCache
from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.store.files import UNREADABLE
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Manifest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")

_UNREADABLE: Final = 1000
"""Files that are named: where there are more the disk is gone."""
_MANIFESTS: Final = 8 * 1024 * 1024
"""Bytes of the manifests that are remembered; parsed they take some five times as much memory."""
_OVERHEAD: Final = 256
_BLOBS: Final = 65536
"""Blobs whose sizes are remembered: images share them."""
_QUESTIONS: Final = 1000
"""For referrers. 20,000 subjects are listed in the same time, and take 3 MB."""


class SeenManifest(NamedTuple):
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
    """Records no use. Belongs to one thread.

    A file whose bytes the disk has lost is passed by as if it was not stored, and named in
    `unreadable`. A `strict` look ends there with StoreError, for a caller that must not take what
    such a file needs for needed by none.
    """

    def __init__(
        self,
        store: Store,
        *,
        hashed: Callable[[str, int], object] = lambda _path, _size: None,
        strict: bool = False,
    ) -> None:
        """`hashed` is told the path and the bytes of each manifest that was read in the store's own
        files and is right."""
        self.unreadable: dict[str, str] = {}
        """By path, the first `_UNREADABLE`: why."""
        self.lost: dict[Digest, str] = {}
        """The same of manifests."""
        self._strict = strict
        self._hashed = hashed
        self._find_manifest = store.manifests.look
        self._find_blob = store.blobs.look
        self._refs = store.refs
        self._subjects: set[str] | None = None
        self._asked = 0
        self._manifests: BoundedCache[tuple[Digest, str], SeenManifest] = BoundedCache(_MANIFESTS)
        self._blobs: BoundedCache[Digest, tuple[int, float]] = BoundedCache(_BLOBS)

    def manifest(self, described: Descriptor) -> SeenManifest | None:
        """A stored manifest; None also if its bytes do not match the digest. Raises StoreError."""
        digest = described.digest
        key = digest, described.media_type
        seen = self._manifests.get(key)
        if seen is not None:
            return seen
        try:
            found = self._find_manifest(digest)
        except StoreError as exc:
            self._pass_by(exc)
            if len(self.lost) < _UNREADABLE:
                self.lost[digest] = f"manifest cannot be read: {exc.reason}"
            return None
        if found is None:
            return None
        holder, used, path = found
        if path:
            self._hashed(path, len(holder.raw))
        holder = with_media_type(holder, described)
        parsed: Manifest | MalformedManifest | None = holder.parsed
        if parsed is None:
            try:
                parsed = holder.manifest
            except MalformedManifest as exc:
                parsed = exc.with_traceback(None)
        seen = SeenManifest(holder.descriptor, parsed, used)
        self._manifests.put(key, seen, len(holder.raw) + _OVERHEAD)
        return seen

    def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """As `Refs.referrers`. Most images have none: after some questions one look at a folder
        tells of which. Raises StoreError."""
        self._asked += 1
        if self._asked == _QUESTIONS:
            self._subjects = self._refs.subjects()
        if self._subjects is not None and str(subject) not in self._subjects:
            return []
        return self.ask(self._refs.referrers, repository, subject) or []

    def ask(self, question: Callable[P, T | None], *words: P.args, **more: P.kwargs) -> T | None:
        """What the store answers; None where the disk has lost the bytes of a file that tells it.
        Raises StoreError."""
        try:
            return question(*words, **more)
        except StoreError as exc:
            self._pass_by(exc)
            return None

    def _pass_by(self, error: StoreError) -> None:
        if not is_lost(error):
            raise error
        if self._strict:
            remedy = "what it needs is not known; `ociproxy check --repair` takes it out of service"
            raise StoreError(error.path, f"{error.reason}: {remedy}") from error
        if len(self.unreadable) < _UNREADABLE:
            self.unreadable[str(error.path)] = error.reason

    def blob(self, digest: Digest) -> tuple[int, float] | None:
        """Bytes of a stored blob, and its last use. Raises StoreError."""
        seen = self._blobs.get(digest)
        if seen is None:
            seen = self._find_blob(digest)
            if seen is not None:
                self._blobs.put(digest, seen)
        return seen


def is_lost(error: StoreError) -> bool:
    """Whether the disk has lost the bytes of a file, while it can read others."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in UNREADABLE
