"""What comes out of a tar, given to the Extractor member by member in one pass.

The tar of an OCI layout says by itself what each blob has to be. A `docker save` tar does not:
its layers are hashed as they come and found again under the names that `manifest.json` uses.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import DOCKER_NAME, LOCK_NAME
from ociproxy.archive.export.volume_writer import VOLUME_NAME
from ociproxy.archive.importer.dockersave import Saved, saved_images
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.importer.volume_reader import LABEL_MAX_SIZE, parse_label
from ociproxy.archive.lock import LOCK_MAX_SIZE, Lock
from ociproxy.errors import LayoutDamaged, LayoutInvalid, LockInvalid, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import (
    INDEX,
    INDEX_MAX_SIZE,
    MARKER,
    check_marker,
    parse_blob_path,
    parse_index,
)
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.archive.importer.decompress import ArchiveStream
    from ociproxy.archive.importer.tar_reader import Member
    from ociproxy.oci.layout import NamedImage
    from ociproxy.store.extract import Extractor

_OWN: Final = "ociproxy-"
_MAX_NAMES: Final = 32 * 1024 * 1024
"""Characters of all the names that are remembered of one archive."""
_LAYER_NAMES: Final = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(slots=True)
class Received:
    """What one source held. `damage` says why it is not known to have come whole."""

    source: str
    images: list[NamedImage] = field(default_factory=list)
    lock: Lock | None = None
    damage: str = ""
    notes: list[str] = field(default_factory=list)


class TarImport:
    """Of one file. `first` is what came out of the volumes before this one, which is added to."""

    def __init__(
        self, extractor: Extractor, stream: ArchiveStream, *, first: Received | None = None
    ) -> None:
        self._extractor = extractor
        self._stream = stream
        self._seen: set[str] = set()
        self._saved: Saved = Saved()
        self._names = 0
        self._docker: bytes | None = None
        self._index: tuple[NamedImage, ...] | None = None
        self._is_first = first is None
        self._received = first or Received(stream.source)
        self._special: dict[str, Callable[[Member], None]] = {
            MARKER: self._take_marker,
            INDEX: self._take_index,
            LOCK_NAME: self._take_lock,
            VOLUME_NAME: self._take_label,
            DOCKER_NAME: self._take_docker,
        }

    def run(self) -> Received:
        """Take everything in. Raises LayoutInvalid, StoreError; damage is noted instead."""
        try:
            for member in members(self._stream):
                self._take(member)
        except LayoutDamaged as exc:
            self._received.damage = self._received.damage or exc.reason
        self._extractor.drain()
        if self._index is not None:
            self._received.images += self._index
        elif self._docker is not None:
            images, notes = saved_images(
                self._docker, self._saved, self._extractor, self._stream.source
            )
            self._received.images += images
            self._received.notes += notes
        elif self._is_first:
            raise LayoutInvalid(self._stream.source, self._why_nothing())
        return self._received

    def _take(self, member: Member) -> None:
        special = self._special.get(member.name)
        if special is not None:
            if member.name in self._seen:
                raise LayoutInvalid(self._stream.source, f"has two files {member.name}")
            if member.link:
                raise LayoutInvalid(self._stream.source, f"{member.name} is a link")
            self._seen.add(member.name)
            special(member)
            return
        digest = parse_blob_path(member.name)
        if digest is None:
            if MARKER not in self._seen and INDEX not in self._seen:
                self._take_saved(member)
        elif member.link:
            self._extractor.damaged[digest] = "is a link in the archive, which is not followed"
        elif self._received.lock is None or digest in self._received.lock.contents:
            self._extractor.take(digest, member.size, member)

    def _take_marker(self, member: Member) -> None:
        check_marker(self._read(member, MANIFEST_MAX_SIZE), self._stream.source)

    def _take_index(self, member: Member) -> None:
        self._index = parse_index(self._read(member, INDEX_MAX_SIZE), self._stream.source)

    def _take_lock(self, member: Member) -> None:
        raw = self._read(member, LOCK_MAX_SIZE)
        try:
            self._received.lock = Lock.parse(raw, LOCK_NAME)
        except LockInvalid as exc:
            raise LayoutInvalid(self._stream.source, str(exc)) from exc

    def _take_label(self, member: Member) -> None:
        # Which volume it is was looked at before; here only whether it is one at all.
        parse_label(self._read(member, LABEL_MAX_SIZE), self._stream.source)

    def _take_docker(self, member: Member) -> None:
        self._docker = self._read(member, INDEX_MAX_SIZE)

    def _take_saved(self, member: Member) -> None:
        """A file or a link that `manifest.json` may speak of further on."""
        if member.name.startswith(_OWN):
            return
        self._names += len(member.name) + len(member.link)
        if self._names > _MAX_NAMES:
            raise LayoutInvalid(self._stream.source, "has too many names that are too long")
        if member.link:
            self._saved.add_link(member.name, member.link)
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
            return  # the stream is at its end, which is noticed next
        self._saved.files[member.name] = digest

    def _read(self, member: Member, limit: int) -> bytes:
        raw = member.read(limit)
        if len(raw) < member.size:
            raise LayoutDamaged(self._stream.source, f"is cut off inside {member.name}")
        return raw

    def _why_nothing(self) -> str:
        if self._received.damage:
            return f"{self._received.damage}, before it said what it holds: nothing to import"
        if "repositories" in self._saved.files:
            return f"has no {DOCKER_NAME}: Docker 1.10 and later write one"
        return f"has neither {INDEX} nor {DOCKER_NAME}: no image archive"
