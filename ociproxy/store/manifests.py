"""`fat/` has the exact bytes of indexes, `img/` those of all other manifests, by digest.

A manifest is hashed whenever it is read from disk. A bounded cache keeps hot ones; one stat at each
use shows a change that another process made.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import ManifestInvalid
from ociproxy.metrics.counters import count_stored
from ociproxy.oci.descriptor import Descriptor, MalformedManifest, OddManifest, is_generic
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ManifestHolder, guess_media_type
from ociproxy.store.files import (
    TOUCH_AFTER,
    file_name,
    identity,
    keep,
    open_unused,
    store_errors,
    touch,
)
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ociproxy.clock import Clock
    from ociproxy.store.read_only import ReadOnlyContent

_ENTRY_OVERHEAD: Final = 1024
"""Bytes of memory that a cached manifest takes beside its own: objects and table entries."""
_LONG: Final = 256 * 1024
"""Bytes. Hashing and parsing as much takes a few milliseconds; other clients would wait for it."""


@dataclass(slots=True)
class _Hot:
    holder: ManifestHolder
    path: str
    identity: tuple[int, int, int]
    used: float


class Manifests:
    def __init__(
        self,
        index_root: Path,
        image_root: Path,
        *,
        staging: Path,
        hot_bytes: int,
        clock: Clock,
        below: Sequence[ReadOnlyContent] = (),
    ) -> None:
        self.folders = (image_root, index_root)
        self._index_root = index_root
        self._image_root = image_root
        self._staging = staging
        self._clock = clock
        self._below = below
        self._hot: BoundedCache[Digest, _Hot] = BoundedCache(hot_bytes)

    def find(self, digest: Digest, *, use: bool = True) -> ManifestHolder | None:
        """A stored manifest; None also if its bytes do not match the digest. With `use`, records
        the use. Raises StoreError.

        The media type is the document's own, or guessed by its shape. The upstream may have given
        another one: the record in `refs/` has that (`with_media_type`).
        """
        own = self._find_own(digest, use=use)
        if own is not None or not self._below:
            return own
        found = (content.find_manifest(digest) for content in self._below)
        return next((holder for holder in found if holder is not None), None)

    def is_long_to_read(self, digest: Digest) -> bool:
        """Whether `find` would read and parse a file of more than `_LONG` bytes. Takes two stats at
        most."""
        if self._hot.get(digest) is not None:
            return False
        name = file_name(digest)
        for root in self.folders:
            with suppress(OSError):
                return (root / name).stat().st_size > _LONG
        return False

    def peek(self, digest: Digest) -> ManifestHolder | None:
        """A manifest of the store's own files, for a caller that reads many: not kept in memory,
        and no use recorded. Raises StoreError."""
        found = self._read(digest)
        return None if found is None else found.holder

    def commit(self, holder: ManifestHolder) -> None:
        """Publish verified bytes under their digest, unless they are there: that counts as a use.
        Raises StoreError."""
        digest = holder.descriptor.digest
        if self._find_own(digest, use=False) is not None and self.keep(digest):
            return
        is_index = holder.descriptor.is_index
        root = self._index_root if is_index else self._image_root
        write_atomically(root / file_name(digest), holder.raw, staging=self._staging)
        count_stored("index" if is_index else "manifest", len(holder.raw))

    def _find_own(self, digest: Digest, *, use: bool) -> ManifestHolder | None:
        hot = self._hot.get(digest)
        if hot is not None:
            try:
                state = os.stat(hot.path)  # noqa: PTH116 hot path
            except OSError:
                self._hot.drop(digest)
            else:
                if identity(state) == hot.identity:
                    now = self._clock.now()
                    if use and now - hot.used > TOUCH_AFTER:
                        hot.used = now
                        self._record_use(hot.path, now)
                    return hot.holder
        found = self._read(digest)
        if found is None:
            return None
        self._hot.put(digest, found, len(found.holder.raw) + _ENTRY_OVERHEAD)
        if use:
            self._record_use(found.path, found.used)
        return found.holder

    def _read(self, digest: Digest) -> _Hot | None:
        name = file_name(digest)
        for root in self.folders:
            path = root / name
            with store_errors(path):
                try:
                    with open_unused(path) as file:
                        state = os.fstat(file.fileno())
                        raw = file.read(min(state.st_size, MANIFEST_MAX_SIZE) + 1)
                except FileNotFoundError:
                    continue
            if len(raw) != state.st_size or Digest.of(raw, digest.algorithm) != digest:
                continue
            try:
                media_type = guess_media_type(raw)
            except MalformedManifest:
                continue
            holder = ManifestHolder(Descriptor(media_type, digest, len(raw)), raw)
            return _Hot(holder, str(path), identity(state), self._clock.now())
        return None

    def keep(self, digest: Digest) -> bool:
        """Record a use now, so that no other process removes the manifest as unused. False where it
        is not stored, or belongs to another user."""
        name, now = file_name(digest), self._clock.now()
        return any([keep(root / name, now) for root in self.folders])

    def last_used(self, digest: Digest) -> float | None:
        """When a manifest was last used, in seconds since the epoch; None if it is not stored.
        Raises StoreError."""
        for root in self.folders:
            path = root / file_name(digest)
            with store_errors(path):
                try:
                    return path.stat().st_atime
                except FileNotFoundError:
                    continue
        return None

    def _record_use(self, path: str, now: float) -> None:
        """What fails here harms no answer: the manifest is in memory already."""
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                touch(file, os.fstat(file), now)
            finally:
                os.close(file)


def with_media_type(holder: ManifestHolder, descriptor: Descriptor | None) -> ManifestHolder:
    """The same bytes under the descriptor's media type, unless that is generic."""
    if descriptor is None or descriptor.media_type == holder.descriptor.media_type:
        return holder
    if is_generic(descriptor.media_type):
        return holder
    return ManifestHolder(replace(holder.descriptor, media_type=descriptor.media_type), holder.raw)


def check_manifest(holder: ManifestHolder, upstream: str) -> None:
    """Raises ManifestInvalid, which names the upstream, unless the bytes fit their media type or
    are an odd manifest."""
    try:
        with suppress(OddManifest):
            _ = holder.manifest
    except MalformedManifest as exc:
        raise ManifestInvalid(upstream, f"manifest {holder.descriptor.digest}: {exc}") from exc
