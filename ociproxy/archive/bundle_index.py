"""What is known of a bundle once it is open: where each blob lies, and what the archive names.

Opening reads the headers of the tar and all manifests, which are hashed. It reads no blobs.

Tests: tests/archive/test_bundle.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ociproxy.archive.entries import sort_entries
from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.naming import name_all
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.lock import LOCK_NAME, Lock
from ociproxy.archive.volumes import DOCUMENTS, LABEL_NAME, VolumeLabel
from ociproxy.errors import DigestMismatch, LayoutDamaged, LayoutInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.image import lost_layers
from ociproxy.oci.layout import (
    INDEX,
    MARKER,
    NO_IMAGES,
    NamedImage,
    check_marker,
    parse_blob_path,
    parse_index,
)
from ociproxy.oci.manifest import (
    MANIFEST_MAX_SIZE,
    ImageManifest,
    Index,
    Manifest,
    ManifestHolder,
    guess_media_type,
    referrer_descriptor,
)
from ociproxy.store.manifests import with_media_type
from ociproxy.store.refs import Records, TagRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

    from ociproxy.oci.reference import Repository

_NEVER_RESOLVED: Final = 0.0
"""An archive does not say when its tags were resolved. Epoch 0 is long expired, so that an upstream
is asked first wherever one can be reached."""


class BundleIndex:
    """Raises LayoutInvalid for a file that is no layout, and LayoutDamaged or DigestMismatch for a
    damaged one; `source` names the file in errors."""

    def __init__(self, file: FileIO, source: str) -> None:
        self.extents: dict[Digest, tuple[int, int]] = {}
        """Of each blob the offset in the file and the size, both in bytes."""
        self.records = Records()
        self.label: VolumeLabel | None = None
        """None where the archive is not split into volumes."""
        self.base: tuple[Digest, ...] = ()
        """Blobs that a delta leaves out: the store or another bundle must have them."""
        self._file = file
        self._source = source
        documents = self._read_headers()
        images = self._read_images(documents)
        self._check_lock(documents)
        self.images = 0
        """Count of the images that have a name."""
        self.left_out: tuple[tuple[str, str], ...] = ()
        """Images that are not served, and the reason of each."""
        self._record(images)

    def _read_headers(self) -> dict[str, bytes]:
        """Fill `extents`; returns the documents by name."""
        documents: dict[str, bytes] = {}
        stream = ArchiveStream(self._file, self._source)
        for member in members(stream):
            digest = parse_blob_path(member.name)
            if member.link and digest is not None:
                raise LayoutInvalid(self._source, f"{member.name} is a link: import the archive")
            if digest is not None:
                self.extents[digest] = (stream.offset, member.size)
            elif member.name in DOCUMENTS:
                documents[member.name] = member.read(DOCUMENTS[member.name])
        return documents

    def _read_images(self, documents: dict[str, bytes]) -> tuple[NamedImage, ...]:
        if LABEL_NAME in documents:
            self.label = VolumeLabel.parse(documents[LABEL_NAME], self._source)
            if INDEX not in documents:
                return ()  # Only the first volume of a set names images.
        if INDEX not in documents:
            raise LayoutInvalid(self._source, f"has no {INDEX}, so it is no OCI image layout")
        if MARKER in documents:
            check_marker(documents[MARKER], self._source)
        images = parse_index(documents[INDEX], self._source)
        if not images and self.extents:
            raise LayoutInvalid(self._source, NO_IMAGES)
        return images

    def _check_lock(self, documents: dict[str, bytes]) -> None:
        """All contents of the lock must be here in their size, except those that another volume or
        the base of a delta has. Raises LayoutDamaged."""
        if LOCK_NAME not in documents:
            return
        lock = Lock.parse(documents[LOCK_NAME], f"{self._source}: {LOCK_NAME}")
        self.base = tuple(digest for digest in lock.omitted if digest not in self.extents)
        for digest, size in lock.contents.items():
            extent = self.extents.get(digest)
            if extent is None and (self.label is not None or digest in lock.omitted):
                continue
            if extent is None or extent[1] != size:
                raise LayoutDamaged(self._source, f"{digest} is not there, or not {size} bytes")

    def _record(self, images: tuple[NamedImage, ...]) -> None:
        """Record tags, the manifests of each repository, and referrers."""
        owners: dict[Digest, set[Repository]] = {}
        entries = sort_entries(images, self._find)
        named, nameless = name_all(entries, None)
        for image, reference in named:
            if self._is_hollow(image.descriptor):
                nameless.append((image, "its manifest has lost its layers: import the archive"))
                continue
            repository = reference.repository
            if reference.tag is not None:
                record = TagRecord(image.descriptor, _NEVER_RESOLVED, repository.registry)
                self.records.tags.setdefault(repository, {})[reference.tag] = record
            self._own(repository, image.descriptor, owners)
            self.images += 1
        self.left_out = tuple(
            (str(image), image.problem or reason)
            for image, reason in (*nameless, *((each, "") for each in entries.refused))
        )
        # A referrer may stand before the referrer that is its subject, so that one pass may not do.
        waiting = entries.referrers
        for _ in range(len(waiting)):
            left = [(each, of) for each, of in waiting if not self._refer(each, of, owners)]
            if len(left) == len(waiting):
                break
            waiting = left

    def _own(
        self, repository: Repository, top: Descriptor, owners: dict[Digest, set[Repository]]
    ) -> None:
        """Record that a repository has an image, and to what its manifests refer."""
        for holder in self._walk(top):
            digest, subject = holder.descriptor.digest, holder.manifest.subject
            self.records.manifests.setdefault(repository, {})[digest] = holder.descriptor
            owners.setdefault(digest, set()).add(repository)
            if subject is not None:
                listed = self.records.referrers.setdefault(subject.digest, {})
                listed[digest] = referrer_descriptor(holder)

    def _refer(
        self, image: NamedImage, subject: Digest, owners: dict[Digest, set[Repository]]
    ) -> bool:
        """Record a referrer in all repositories that have its subject; False where none is known to
        have it."""
        for repository in sorted(owners.get(subject, ()), key=str):
            self._own(repository, image.descriptor, owners)
        return subject in owners

    def _is_hollow(self, descriptor: Descriptor) -> bool:
        manifest = self._find(descriptor)
        if not isinstance(manifest, ImageManifest) or manifest.layers:
            return False
        offset, size = self.extents.get(manifest.config.digest, (0, 0))
        config = os.pread(self._file.fileno(), min(size, MANIFEST_MAX_SIZE), offset)
        return bool(lost_layers(manifest, config))

    def _find(self, descriptor: Descriptor) -> Manifest | None:
        holder = self._manifest(descriptor)
        return None if holder is None else holder.manifest

    def _walk(self, top: Descriptor) -> Iterator[ManifestHolder]:
        """The manifests of an image that are in the archive."""
        waiting, seen = [top], {top.digest}
        while waiting:
            holder = self._manifest(waiting.pop())
            if holder is None:
                continue
            yield holder
            if isinstance(holder.manifest, Index):
                # Only children that are in the archive: a hostile index may list any number.
                fresh = {
                    each.digest: each
                    for each in holder.manifest.children
                    if each.digest in self.extents and each.digest not in seen
                }
                seen.update(fresh)
                waiting.extend(fresh.values())

    def _manifest(self, descriptor: Descriptor) -> ManifestHolder | None:
        """None where the archive lacks it. Raises LayoutInvalid for one that is too large,
        DigestMismatch or LayoutDamaged for a damaged one."""
        digest = descriptor.digest
        extent = self.extents.get(digest)
        if extent is None:
            return None
        if extent[1] > MANIFEST_MAX_SIZE:
            raise LayoutInvalid(self._source, f"manifest {digest} has {extent[1]} bytes")
        raw = os.pread(self._file.fileno(), extent[1], extent[0])
        actual = Digest.of(raw, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(f"{self._source}: manifest {digest}", digest, actual)
        try:
            own = ManifestHolder(Descriptor(guess_media_type(raw), digest, len(raw)), raw)
            holder = with_media_type(own, descriptor)
            _ = holder.manifest
        except MalformedManifest as exc:
            raise LayoutDamaged(self._source, f"manifest {digest}: {exc}") from exc
        return holder
