"""Takes a tar in, one pass over its members, each given to the Extractor as it comes.

In the tar of an OCI layout a blob's name is its digest. A `docker save` tar has no digests: its
layers are hashed as they come, and found again under the file names that `manifest.json` uses.

Tests: tests/archive/importer/test_importer.py, tests/archive/importer/test_dockersave.py,
tests/archive/importer/test_hostile.py.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import DOCKER_NAME
from ociproxy.archive.importer.dockersave import SavedFiles, saved_images
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.lock import LOCK_NAME, Lock
from ociproxy.archive.volumes import DOCUMENTS, LABEL_NAME, VolumeLabel
from ociproxy.errors import LayoutDamaged, LayoutInvalid, LockInvalid, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import (
    INDEX,
    INDEX_MAX_SIZE,
    MARKER,
    NO_IMAGES,
    check_marker,
    parse_blob_path,
    parse_index,
)
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ImageManifest

if TYPE_CHECKING:
    from ociproxy.archive.importer.decompress import ArchiveStream
    from ociproxy.archive.importer.results import Received
    from ociproxy.archive.importer.tar_reader import Member
    from ociproxy.oci.layout import NamedImage
    from ociproxy.store.extract import Extractor

_DOCUMENTS: Final = {**DOCUMENTS, DOCKER_NAME: INDEX_MAX_SIZE}
_OWN: Final = "ociproxy-"
_MAX_NAMES: Final = 32 * 1024 * 1024
"""Characters of all file names of one `docker save` archive together: they are kept in memory."""
_LAYER_NAMES: Final = (".tar", ".tar.gz", ".tgz", ".tar.zst")


class TarImport:
    """The import of one file; what the file holds is added to `received`. Of the volumes of a set
    only the `first` has to say what the archive holds."""

    def __init__(
        self, extractor: Extractor, stream: ArchiveStream, received: Received, *, first: bool
    ) -> None:
        self._extractor = extractor
        self._stream = stream
        self._received = received
        self._is_first = first
        self._seen: set[str] = set()
        self._files = SavedFiles()
        self._names = 0
        self._blobs = False
        self._docker: bytes | None = None
        self._index: tuple[NamedImage, ...] | None = None

    def run(self) -> None:
        """Take all members in. Damage is noted in `received`, so that what came before it counts.

        Raises LayoutInvalid, StoreError.
        """
        source, received = self._stream.source, self._received
        try:
            for member in members(self._stream):
                self._take(member)
        except LayoutDamaged as exc:
            received.damage = received.damage or exc.reason
        self._extractor.drain()
        if self._docker is not None and any(map(self._is_hollow, self._index or ())):
            self._index = None
        if self._index is not None:
            if not self._index and self._blobs:
                raise LayoutInvalid(source, NO_IMAGES)
            received.images += self._index
        elif self._docker is not None:
            images, notes = saved_images(self._docker, self._files, self._extractor, source)
            received.images += images
            received.notes += notes
        elif self._is_first:
            raise LayoutInvalid(source, self._why_nothing())

    def _is_hollow(self, image: NamedImage) -> bool:
        """Whether the manifest of an image lacks the layers that `manifest.json` may name."""
        manifest = self._extractor.find_manifest(image.descriptor)
        return isinstance(manifest, ImageManifest) and bool(self._extractor.lost_layers(manifest))

    def _take(self, member: Member) -> None:
        if member.name in _DOCUMENTS:
            self._take_document(member)
            return
        digest = parse_blob_path(member.name)
        if digest is None:
            if MARKER not in self._seen and INDEX not in self._seen:
                self._take_saved(member)
            return
        self._blobs = True
        if member.link:
            self._extractor.damaged[digest] = "is a link in the archive, which is not followed"
        elif self._received.lock is None or digest in self._received.lock.contents:
            self._extractor.take(digest, member.size, member)

    def _take_document(self, member: Member) -> None:
        source, name = self._stream.source, member.name
        if name in self._seen:
            raise LayoutInvalid(source, f"has two files {name}")
        if member.link:
            raise LayoutInvalid(source, f"{name} is a link")
        self._seen.add(name)
        raw = member.read(_DOCUMENTS[name])
        if len(raw) < member.size:
            raise LayoutDamaged(source, f"is cut off inside {name}")
        if name == MARKER:
            check_marker(raw, source)
        elif name == INDEX:
            self._index = parse_index(raw, source)
        elif name == LOCK_NAME:
            try:
                self._received.lock = Lock.parse(raw, LOCK_NAME)
            except LockInvalid as exc:
                raise LayoutInvalid(source, str(exc)) from exc
        elif name == LABEL_NAME:
            VolumeLabel.parse(raw, source)  # `grouped` has put the volumes in order; here a check.
        else:
            self._docker = raw

    def _take_saved(self, member: Member) -> None:
        """Take in a file or a link that a `manifest.json` further on may name."""
        if member.name.startswith(_OWN):
            return
        self._names += len(member.name) + len(member.link)
        if self._names > _MAX_NAMES:
            raise LayoutInvalid(self._stream.source, "has too many names that are too long")
        if member.link:
            self._files.add_link(member.name, member.link)
            return
        is_layer = member.name.endswith(_LAYER_NAMES)
        if not is_layer and member.size > MANIFEST_MAX_SIZE:
            return
        try:
            if is_layer:
                digest = self._extractor.take_unnamed(member.size, member)
            else:
                raw = member.read(MANIFEST_MAX_SIZE)
                if len(raw) < member.size or raw.lstrip()[:1] != b"{":
                    return
                digest = Digest.of(raw)
                self._extractor.take(digest, len(raw), io.BytesIO(raw))
        except SizeMismatch:
            return  # The stream is at its end, which `members` reports next.
        self._files.digests[member.name] = digest

    def _why_nothing(self) -> str:
        if self._received.damage:
            return f"{self._received.damage}, before it said what it holds: nothing to import"
        if "repositories" in self._files.digests:
            return f"has no {DOCKER_NAME}: Docker 1.10 and later write one"
        return f"has neither {INDEX} nor {DOCKER_NAME}: no image archive"
