"""`fat/` has the exact bytes of indexes, `img/` those of all other manifests, by digest.

A manifest is hashed whenever it is read from disk. A bounded cache keeps hot ones; one stat at each
use shows a change that another process made.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import ManifestInvalid
from ociproxy.metrics.counters import count_stored
from ociproxy.oci.descriptor import Descriptor, MalformedManifest, OddManifest, is_generic
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import (
    MANIFEST_MAX_SIZE,
    ManifestHolder,
    json_object,
    media_type_of,
    parse_document,
    parsing,
)
from ociproxy.store.files import (
    TOUCH_AFTER,
    file_name,
    identity,
    keep,
    read_unused,
    store_errors,
    touch,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.clock import Clock
    from ociproxy.oci.manifest import Manifest
    from ociproxy.store.group_commit import Commit
    from ociproxy.store.read_only import ReadOnlyContent
    from ociproxy.store.staging import Pending
    from ociproxy.store.usage import UsageFile

_ENTRY_OVERHEAD: Final = 1024
"""Bytes of memory that a cached manifest takes beside its own: objects and table entries."""


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
        pending: Pending,
        usage: UsageFile,
        hot_bytes: int,
        clock: Clock,
        below: Sequence[ReadOnlyContent] = (),
    ) -> None:
        self.folders = (image_root, index_root)
        self._pending = pending
        self._prefixes = tuple(f"{root}{os.sep}" for root in self.folders)
        self._index_root = index_root
        self._image_root = image_root
        self._usage = usage
        self._clock = clock
        self._below = below
        self._hot: BoundedCache[Digest, _Hot] = BoundedCache(hot_bytes)
        self._hot_below: BoundedCache[Digest, ManifestHolder] = BoundedCache(hot_bytes)

    def find(self, digest: Digest, *, use: bool = True) -> ManifestHolder | None:
        """A stored manifest; None also if its bytes do not match the digest. With `use`, records
        the use. Raises StoreError.

        The media type is the document's own, or guessed by its shape. The upstream may have given
        another one: the record in `refs/` has that (`with_media_type`).
        """
        own = self._find_own(digest, use=use)
        if own is not None or not self._below:
            return own
        hot = self._hot_below.get(digest)
        if hot is None:
            found = (content.find_manifest(digest) for content in self._below)
            hot = next((holder for holder in found if holder is not None), None)
            if hot is not None:
                self._hot_below.put(digest, hot, len(hot.raw))
        return hot

    def remembers(self, digest: Digest) -> bool:
        """Whether `find` takes one stat, of a file that was looked at in the last minute: the event
        loop may call it then, for no disk is asked."""
        hot = self._hot.get(digest)
        return hot is not None and self._clock.now() - hot.used <= TOUCH_AFTER

    def peek(self, digest: Digest) -> ManifestHolder | None:
        """A manifest of the store's own files, for a caller that reads many: not kept in memory,
        and no use recorded. Raises StoreError."""
        pending = self._find_pending(file_name(digest))
        if pending is not None:
            return _as_read(digest, pending[1], parse=True)
        found = self._read(digest, parse=True)
        return None if found is None else found[0]

    def look(self, digest: Digest) -> tuple[ManifestHolder, float, str] | None:
        """The same of all that `find` finds, the last use in seconds since the epoch, 0 if unknown,
        and the path of the file that was read, empty where none was."""
        pending = self._find_pending(file_name(digest))
        if pending is not None:
            holder = _as_read(digest, pending[1], parse=True)
            return None if holder is None else (holder, self._clock.now(), "")
        found = self._read(digest, parse=True)
        if found is not None:
            return found[0], found[2].st_atime, found[1]
        below = (content.find_manifest(digest) for content in self._below)
        return next(((holder, 0.0, "") for holder in below if holder is not None), None)

    def put(self, holder: ManifestHolder, commit: Commit) -> None:
        """Publish verified bytes under their digest, unless they are there: that counts as a use.
        Raises StoreError."""
        digest = holder.descriptor.digest
        if self.keep(digest) and self._find_own(digest, use=False) is not None:
            return
        # Also where another commit has it: that one may fail.
        root = self._index_root if holder.descriptor.is_index else self._image_root
        path = f"{root}{os.sep}{file_name(digest)}"
        commit.stage(path, holder.raw, holder.raw, record=False)

    def count(self, made: Sequence[tuple[str, int]]) -> None:
        """These files, of so many bytes, are there now. They are counted here and not where they
        are staged: a commit may fail."""
        index = str(self._index_root)
        for path, size in made:
            count_stored("index" if path.startswith(index) else "manifest", size)
        self._usage.add(sum(size for _, size in made))

    def use(self, digest: Digest, commit: Commit) -> None:
        """Keep a manifest for a record in this commit, which may not come without it: record a use
        now, and publish here, too, what another commit of this process has staged. Raises
        StoreError."""
        name = file_name(digest)
        if any(f"{prefix}{name}" in commit for prefix in self._prefixes) or self.keep(digest):
            return
        pending = self._find_pending(name)
        if pending is not None:
            path, raw = pending
            commit.stage(path, raw, raw, record=False)

    def _find_pending(self, name: str) -> tuple[str, bytes] | None:
        """The path and the bytes of what has no name yet."""
        if self._pending:
            for prefix in self._prefixes:
                raw = self._pending.get(prefix + name)
                if isinstance(raw, bytes):
                    return prefix + name, raw
        return None

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
        # Before the file: a commit that ends just now takes it out after it has its name.
        pending = self._find_pending(file_name(digest))
        if pending is not None:
            return _as_read(digest, pending[1])
        found = self._read(digest)
        if found is None:
            return None
        holder, path, state = found
        now = self._clock.now()
        hot = _Hot(holder, path, identity(state), now)
        self._hot.put(digest, hot, len(holder.raw) + _ENTRY_OVERHEAD)
        if use:
            self._record_use(path, now)
        return holder

    def _read(
        self, digest: Digest, *, parse: bool = False
    ) -> tuple[ManifestHolder, str, os.stat_result] | None:
        """A manifest, its path and the state of its file."""
        name = file_name(digest)
        for root in self.folders:
            path = f"{root}{os.sep}{name}"
            try:
                raw, state = read_unused(path, MANIFEST_MAX_SIZE)
            except FileNotFoundError:
                continue
            except OSError:
                with store_errors(Path(path)):
                    raise
            if len(raw) != state.st_size or Digest.of(raw, digest.algorithm) != digest:
                continue
            holder = _as_read(digest, raw, parse=parse)
            if holder is None:
                continue
            return holder, path, state
        return None

    def keep(self, digest: Digest) -> bool:
        """Record a use now, so that no other process removes the manifest as unused. False where it
        is not stored, or belongs to another user."""
        name, now = file_name(digest), self._clock.now()
        return any([keep(prefix + name, now) for prefix in self._prefixes])

    def last_used(self, digest: Digest) -> float | None:
        """When a manifest was last used, in seconds since the epoch; None if it is not stored.
        Raises StoreError."""
        for root in self.folders:
            path = f"{root}{os.sep}{file_name(digest)}"
            try:
                return os.stat(path).st_atime  # noqa: PTH116 hot path
            except FileNotFoundError:
                continue
            except OSError:
                with store_errors(Path(path)):
                    raise
        return None

    def _record_use(self, path: str, now: float) -> None:
        """What fails here harms no answer: the manifest is in memory already."""
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                touch(file, os.fstat(file), now)
            finally:
                os.close(file)


def _as_read(digest: Digest, raw: bytes, *, parse: bool = False) -> ManifestHolder | None:
    """Verified bytes under the media type that they tell; None if they are no manifest. A caller
    that will look into it saves reading its JSON twice with `parse`."""
    parsed: Manifest | None = None
    try:
        with parsing(raw):
            document = json_object(raw)
            media_type = media_type_of(document)
            if parse:
                with suppress(MalformedManifest):  # the caller hears of it when it looks
                    parsed = parse_document(document, media_type)
    except MalformedManifest:
        return None
    return ManifestHolder(Descriptor(media_type, digest, len(raw)), raw, parsed)


def with_media_type(holder: ManifestHolder, descriptor: Descriptor | None) -> ManifestHolder:
    """The same bytes under the descriptor's media type, unless that is generic."""
    if descriptor is None or descriptor.media_type == holder.descriptor.media_type:
        return holder
    if is_generic(descriptor.media_type):
        return holder
    return ManifestHolder(holder.descriptor._replace(media_type=descriptor.media_type), holder.raw)


def check_manifest(holder: ManifestHolder, upstream: str) -> None:
    """Raises ManifestInvalid, which names the upstream, unless the bytes fit their media type or
    are an odd manifest."""
    try:
        with suppress(OddManifest):
            _ = holder.manifest
    except MalformedManifest as exc:
        raise ManifestInvalid(upstream, f"manifest {holder.descriptor.digest}: {exc}") from exc
