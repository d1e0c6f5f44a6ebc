"""A bundle: an archive that is served from as it is, a layer under the store.

Opening it reads the headers of the tar and the manifests, which are all hashed, and remembers where
each blob lies. A blob is hashed before it is served for the first time, and not again while the
process runs and the file stays as it was.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import LOCK_NAME
from ociproxy.archive.export.volume_writer import VOLUME_NAME
from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.importer.volume_reader import LABEL_MAX_SIZE, parse_label
from ociproxy.archive.lock import LOCK_MAX_SIZE, Lock
from ociproxy.bounded import BoundedCache
from ociproxy.errors import ConfigError, DigestMismatch, LayoutDamaged, LayoutInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import (
    INDEX,
    INDEX_MAX_SIZE,
    MARKER,
    NamedImage,
    check_marker,
    parse_blob_path,
    parse_index,
)
from ociproxy.oci.manifest import (
    MANIFEST_MAX_SIZE,
    Index,
    ManifestHolder,
    guess_media_type,
    referrer_descriptor,
)
from ociproxy.store.files import READ_SIZE, read_buffer
from ociproxy.store.manifests import with_media_type
from ociproxy.store.read_only import BlobFile, Records, TagRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

    from ociproxy.archive.importer.volume_reader import VolumeLabel
    from ociproxy.oci.reference import Repository

_HOT_BYTES: Final = 4 * 1024 * 1024
"""Of manifests that are kept in memory."""
_PACKED: Final = (b"\x28\xb5\x2f\xfd", b"\x1f\x8b")
_NEVER_ASKED: Final = 0.0
"""When its tags were resolved: an archive does not say, so that an upstream that can be reached is
asked before they count as fresh."""


class Bundle:
    """One archive, open until `close`. Raises ConfigError where it cannot be opened, LayoutInvalid,
    or DigestMismatch for a damaged manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = Records()
        self._file = _open(path)
        self._state = _identity(self._file)
        self._extents: dict[Digest, tuple[int, int]] = {}
        self._verified: set[Digest] = set()
        self._damaged: dict[Digest, DigestMismatch] = {}
        self._verifying: dict[Digest, threading.Lock] = {}
        self._guard = threading.Lock()
        self._hot: BoundedCache[Digest, ManifestHolder] = BoundedCache(_HOT_BYTES)
        self.label: VolumeLabel | None = None
        """Which volume it is, if it is one."""
        self.base: tuple[Digest, ...] = ()
        """What a delta leaves out, and whoever serves it has to have."""
        try:
            documents = self._read_headers()
            self._images = self._named(documents)
            self._check_contents(documents)
            self._record()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Blobs that somebody has open stay open."""
        self._file.close()

    @property
    def images(self) -> int:
        """How many names it has."""
        return sum(image.reference is not None for image in self._images)

    # A layer of the store

    def find_blob(self, digest: Digest) -> BlobFile | None:
        extent = self._extent(digest)
        if extent is None:
            return None
        offset, size = extent
        file = os.fdopen(os.dup(self._file.fileno()), "rb", 0)
        return BlobFile(file, size, self._is_verified(digest), offset, self)

    def find_blob_size(self, digest: Digest) -> int | None:
        extent = self._extent(digest)
        return None if extent is None else extent[1]

    def verify_blob(self, digest: Digest) -> None:
        """Whoever comes while it is being hashed waits for that."""
        with self._guard:
            turn = self._verifying.setdefault(digest, threading.Lock())
        with turn:
            try:
                if digest in self._damaged:
                    raise self._damaged[digest].with_traceback(None)
                if not self._is_verified(digest):
                    self._verify(digest)
            finally:
                with self._guard:
                    self._verifying.pop(digest, None)

    def find_manifest(self, digest: Digest) -> ManifestHolder | None:
        hot = self._hot.get(digest)
        if hot is not None:
            return hot
        extent = self._extent(digest)
        if extent is None or extent[1] > MANIFEST_MAX_SIZE:
            return None
        raw = os.pread(self._file.fileno(), extent[1], extent[0])
        if Digest.of(raw, digest.algorithm) != digest:
            return None
        try:
            holder = ManifestHolder.of(raw, algorithm=digest.algorithm)
        except MalformedManifest:
            return None
        self._hot.put(digest, holder, len(raw))
        return holder

    def _extent(self, digest: Digest) -> tuple[int, int] | None:
        return None if digest in self._damaged else self._extents.get(digest)

    def _is_verified(self, digest: Digest) -> bool:
        with self._guard:
            state = _identity(self._file)
            if state != self._state:
                # Somebody writes into the file: nothing that was known of it is.
                self._state = state
                self._verified.clear()
            return digest in self._verified

    def _verify(self, digest: Digest) -> None:
        offset, left = self._extents[digest]
        state = _identity(self._file)
        hasher = digest.hasher()
        buffer = read_buffer(READ_SIZE)
        while left:
            count = os.preadv(self._file.fileno(), [buffer[: min(left, READ_SIZE)]], offset)
            if not count:
                break
            hasher.update(buffer[:count])
            offset, left = offset + count, left - count
        actual = Digest.finish(hasher, digest.algorithm)
        if actual != digest:
            self._damaged[digest] = DigestMismatch(f"{self.path}: blob {digest}", digest, actual)
            raise self._damaged[digest]
        with self._guard:
            # What was written to while it was read is not known: the next reader looks again.
            if state == self._state == _identity(self._file):
                self._verified.add(digest)

    # Opening

    def _read_headers(self) -> dict[str, bytes]:
        """Where the blobs lie; returns the documents."""
        limits = {MARKER: MANIFEST_MAX_SIZE, INDEX: INDEX_MAX_SIZE, LOCK_NAME: LOCK_MAX_SIZE}
        limits[VOLUME_NAME] = LABEL_MAX_SIZE
        documents: dict[str, bytes] = {}
        stream = ArchiveStream(self._file, str(self.path))
        for member in members(stream):
            digest = parse_blob_path(member.name)
            if member.link and digest is not None:
                raise LayoutInvalid(str(self.path), f"{member.name} is a link: import the archive")
            if digest is not None:
                self._extents[digest] = (stream.offset, member.size)
            elif member.name in limits:
                documents[member.name] = member.read(limits[member.name])
        return documents

    def _named(self, documents: dict[str, bytes]) -> tuple[NamedImage, ...]:
        source = str(self.path)
        if VOLUME_NAME in documents and INDEX not in documents:
            return ()  # a volume after the first has blobs only
        for name in (MARKER, INDEX):
            if name not in documents:
                raise LayoutInvalid(source, f"has no {name}, so it is no OCI image layout")
        check_marker(documents[MARKER], source)
        return parse_index(documents[INDEX], source)

    def _check_contents(self, documents: dict[str, bytes]) -> None:
        """What the lock speaks of has to be there, in its size, unless other files have it."""
        if VOLUME_NAME in documents:
            self.label = parse_label(documents[VOLUME_NAME], str(self.path))
        if LOCK_NAME not in documents:
            return
        lock = Lock.parse(documents[LOCK_NAME], f"{self.path}: {LOCK_NAME}")
        elsewhere = VOLUME_NAME in documents
        self.base = tuple(digest for digest in lock.omitted if digest not in self._extents)
        for digest, size in lock.contents.items():
            extent = self._extents.get(digest)
            if extent is None and (elsewhere or digest in lock.omitted):
                continue
            if extent is None or extent[1] != size:
                raise LayoutDamaged(str(self.path), f"{digest} is not there, or not {size} bytes")

    def _record(self) -> None:
        """What the names lead to, which repository has which manifest, and what refers to what."""
        owners: dict[Digest, set[Repository]] = {}
        nameless = []
        for image in self._images:
            reference = image.reference
            if reference is None:
                nameless.append(image.descriptor)
                continue
            repository = reference.repository
            if reference.tag is not None:
                record = TagRecord(image.descriptor, _NEVER_ASKED, repository.registry)
                self.records.tags.setdefault(repository, {})[reference.tag] = record
            self._own(repository, image.descriptor, owners)
        # A referrer may refer to another one that stands after it.
        for _ in range(len(nameless)):
            left = [each for each in nameless if not self._refer(each, owners)]
            if len(left) == len(nameless):
                break
            nameless = left

    def _own(
        self, repository: Repository, top: Descriptor, owners: dict[Digest, set[Repository]]
    ) -> None:
        for descriptor in self._walk(top):
            known = self.records.manifests.setdefault(repository, {})
            known[descriptor.digest] = descriptor
            owners.setdefault(descriptor.digest, set()).add(repository)

    def _refer(self, descriptor: Descriptor, owners: dict[Digest, set[Repository]]) -> bool:
        """Take in an entry without a name, which belongs to whoever has its subject; False where
        nobody is known to have it."""
        holder = self._manifest(descriptor)
        subject = None if holder is None else holder.manifest.subject
        if holder is None or subject is None or subject.digest not in owners:
            return False
        listed = referrer_descriptor(holder)
        self.records.referrers.setdefault(subject.digest, {})[descriptor.digest] = listed
        for repository in sorted(owners[subject.digest], key=str):
            self._own(repository, descriptor, owners)
        return True

    def _walk(self, top: Descriptor) -> Iterator[Descriptor]:
        """The manifests that are here of an image."""
        waiting, seen = [top], {top.digest}
        while waiting:
            descriptor = waiting.pop()
            holder = self._manifest(descriptor)
            if holder is None:
                continue
            yield holder.descriptor
            if isinstance(holder.manifest, Index):
                # No more than the archive has members, whatever indexes speak of.
                fresh = {
                    each.digest: each
                    for each in holder.manifest.manifests
                    if each.digest in self._extents and each.digest not in seen
                }
                seen.update(fresh)
                waiting.extend(fresh.values())

    def _manifest(self, descriptor: Descriptor) -> ManifestHolder | None:
        """None where it is not here. Raises DigestMismatch or LayoutDamaged where it is wrong."""
        digest = descriptor.digest
        extent = self._extents.get(digest)
        if extent is None:
            return None
        if extent[1] > MANIFEST_MAX_SIZE:
            raise LayoutInvalid(str(self.path), f"manifest {digest} has {extent[1]} bytes")
        raw = os.pread(self._file.fileno(), extent[1], extent[0])
        actual = Digest.of(raw, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(f"{self.path}: manifest {digest}", digest, actual)
        try:
            own = ManifestHolder(Descriptor(guess_media_type(raw), digest, len(raw)), raw)
            holder = with_media_type(own, descriptor)
            _ = holder.manifest
        except MalformedManifest as exc:
            raise LayoutDamaged(str(self.path), f"manifest {digest}: {exc}") from exc
        return holder


def _open(path: Path) -> FileIO:
    try:
        file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115 open for as long as it is served
    except OSError as exc:
        raise ConfigError((exc.strerror or str(exc)).lower(), file=str(path)) from exc
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LayoutInvalid(str(path), "is not a file: a bundle is an archive in one")
    if os.pread(file.fileno(), 4, 0).startswith(_PACKED):
        file.close()
        raise LayoutInvalid(str(path), "is compressed: unpack it to serve it, as with zstd -d")
    return file


def _identity(file: FileIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns
