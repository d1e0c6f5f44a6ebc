"""Which blobs the manifests of a repository refer to.

The answer is read from the stored manifests of the repository. A bounded cache keeps it until the
folder of the repository's records changes. What a bundle says of a repository counts for the blobs
that came with it, as with an import: one that only names a blob might name any.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import DigestInvalid, DigestMismatch
from ociproxy.oci.descriptor import MalformedManifest, is_manifest, text_in
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import json_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.oci.reference import Repository
    from ociproxy.store.manifests import Manifests
    from ociproxy.store.read_only import ReadOnlyContent
    from ociproxy.store.refs import Refs

_MOST_DIGESTS: Final = 262_144
"""Digests kept of all repositories together; each takes about a hundred bytes of memory."""
_MOST_OF_ONE: Final = 65_536
"""Digests kept of one repository, those of its newest manifests."""
_SETTLED: Final = 0.1
"""Seconds. Two changes of a folder closer together may leave it with one time of modification."""
_LOCKS: Final = 16
"""The most repositories that are read at the same time."""


@dataclass(slots=True)
class _Known:
    """What one repository refers to. `state` is what a stat of its folder said when it was read;
    None if the folder had changed just before. `complete` says that all manifests were read."""

    state: tuple[int, int] | None = None
    complete: bool = False
    manifests: set[Digest] = field(default_factory=set)
    blobs: set[bytes] = field(default_factory=set)


class Membership:
    """Thread-safe."""

    def __init__(
        self, refs: Refs, manifests: Manifests, below: Sequence[ReadOnlyContent] = ()
    ) -> None:
        self._refs = refs
        self._manifests = manifests
        self._below = below
        self._known: BoundedCache[Repository, _Known] = BoundedCache(_MOST_DIGESTS)
        self._reading = tuple(Lock() for _ in range(_LOCKS))

    def refers(self, repository: Repository, blob: Digest) -> bool | None:
        """Whether a manifest of the repository refers to the blob; None if only `read` can tell.
        Takes one stat."""
        known = self._known.get(repository)
        if known is None or known.state is None:
            return None
        if known.state != self._refs.manifests_state(repository):
            return None
        if _key(blob) in known.blobs:
            return True
        return False if known.complete else None

    def read(self, repository: Repository, blob: Digest) -> bool:
        """The same, read from the store: blocks. Raises StoreError."""
        with self._reading[hash(repository) % _LOCKS]:
            found = self.refers(repository, blob)
            if found is None:
                known = self._read(repository, _key(blob))
                self._known.put(repository, known, len(known.manifests) + len(known.blobs) + 1)
                found = _key(blob) in known.blobs
            return found

    def is_carried(self, repository: Repository, blob: Digest) -> bool:
        """Whether content below the store has the blob, and names it in a manifest of this
        repository. Blocks: hashes the blob, so that no bundle can claim one with other bytes in its
        place. Raises StoreError."""
        for content in self._below:
            named = any(
                blob in named_blobs(holder.raw)
                for digest in content.records.manifests.get(repository, ())
                if (holder := content.find_manifest(digest)) is not None
            )
            for other in self._below if named else ():
                # A set of volumes is one archive.
                if other.origin == content.origin and other.find_blob_size(blob) is not None:
                    with suppress(DigestMismatch):
                        other.verify_blob(blob)
                        return True
        return False

    def _read(self, repository: Repository, wanted: bytes) -> _Known:
        """Read manifests, the newest first, until one refers to the wanted blob."""
        # Taken before the names: a manifest that comes later changes the state.
        state = self._refs.manifests_state(repository)
        names = self._refs.newest_manifests(repository)
        old = self._known.get(repository)
        known = _Known()
        if old is not None and old.manifests <= set(names):
            known = _Known(None, False, set(old.manifests), set(old.blobs))
        lacking = False
        for digest in names:
            if wanted in known.blobs:
                break
            if len(known.blobs) >= _MOST_OF_ONE or len(known.manifests) >= _MOST_OF_ONE:
                known.complete = True  # the limit: older manifests are not read
                break
            if digest not in known.manifests:
                holder = self._manifests.peek(digest)
                if holder is None:
                    lacking = True  # its bytes may come back without a change of the folder
                    continue
                known.manifests.add(digest)
                known.blobs.update(map(_key, named_blobs(holder.raw)))
        else:
            known.complete = not lacking
        if state is not None and time.time() - state[1] / 1e9 > _SETTLED:
            known.state = state
        return known


def named_blobs(raw: bytes) -> Iterator[Digest]:
    """The blobs of an image manifest, an artifact, a schema 1 manifest or an index. A blob with
    `urls` is left out: another server keeps it, and any manifest may name it."""
    try:
        document = json_object(raw)
    except MalformedManifest:
        return
    each: list[object] = [document.get("config")]
    for name in ("layers", "blobs", "fsLayers"):
        values = document.get(name)
        each += values if isinstance(values, list) else []
    entries = document.get("manifests")
    each += [
        entry
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and not is_manifest(text_in(entry.get("mediaType")))
    ]
    for value in each:
        if isinstance(value, dict) and not value.get("urls"):
            with suppress(DigestInvalid):
                yield Digest.parse(str(value.get("digest", value.get("blobSum"))))


def _key(digest: Digest) -> bytes:
    """Half of a sha256 digest: enough to tell two apart, in a quarter of the memory."""
    return bytes.fromhex(digest.encoded[:32])
