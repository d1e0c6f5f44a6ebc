"""The cache folder of an ociregistry, versions 1.3 (`blobs/ fat/ img/`) to 1.17 (`blobs/ img/
lts/`).

A blob is a file named by the hexadecimal part of its digest. A manifest is in a JSON *holder*, with
its exact bytes in base64 as `bytes`, its `digest`, the reference that a client pulled as
`imageUrl`, and its `mediaType` (1.3) or its `type` as a number (later).
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.results import unreadable
from ociproxy.errors import DigestInvalid, DigestMismatch, NameInvalid
from ociproxy.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    MalformedManifest,
)
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import NamedImage, open_regular
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, json_object
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

    from ociproxy.store.extract import Extractor

_BLOBS: Final = "blobs"
_MANIFESTS: Final = ("fat", "img", "lts")
_TYPES: Final = (DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST)
"""The `type` of a holder is a position in this list."""
_HOLDER_MAX_SIZE: Final = 4 * MANIFEST_MAX_SIZE
"""Bytes: a holder has the manifest in base64, and once more as ociregistry parsed it."""


@dataclass(frozen=True, slots=True)
class CacheFolder:
    root: Path

    @staticmethod
    def is_one(root: Path) -> bool:
        return (root / _BLOBS).is_dir() and any((root / name).is_dir() for name in _MANIFESTS)

    def images(self, extractor: Extractor) -> list[NamedImage]:
        """Give all manifests to the extractor, and return each with the reference that it was
        pulled by. Of several holders with one tag the newest keeps the tag, and the others go by
        digest: upstream had moved the tag."""
        found: list[NamedImage] = []
        taken: dict[Reference, Digest] = {}
        for where in self._holders():
            try:
                image = self._image(where, extractor)
            except (MalformedManifest, NameInvalid, DigestInvalid, DigestMismatch) as exc:
                found.append(unreadable(f"{where}: {exc}"))
                continue
            reference, digest = image.reference, image.descriptor.digest
            if reference is not None and taken.setdefault(reference, digest) != digest:
                reference = Reference(reference.repository, digest=digest)
            found.append(NamedImage(image.descriptor, reference))
        return found

    def _holders(self) -> list[str]:
        """Paths below the root, the newest file first."""
        times: dict[str, float] = {}
        for folder in _MANIFESTS:
            path = self.root / folder
            if path.is_dir():
                for entry in os.scandir(path):
                    times[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_mtime
        return sorted(times, key=lambda where: (-times[where], where))

    def open_blob(self, digest: Digest) -> FileIO | None:
        """None where the cache lacks the blob. Raises LayoutInvalid."""
        return open_regular(self.root, f"{_BLOBS}/{digest.encoded}")

    def _image(self, where: str, extractor: Extractor) -> NamedImage:
        """Raises MalformedManifest, NameInvalid, DigestInvalid, DigestMismatch, LayoutInvalid."""
        file = open_regular(self.root, where)
        if file is None:
            raise MalformedManifest("went away")
        with file:
            raw = file.read(_HOLDER_MAX_SIZE + 1)
        if not raw or len(raw) > _HOLDER_MAX_SIZE:
            raise MalformedManifest(f"is empty or larger than {_HOLDER_MAX_SIZE} bytes")
        holder = json_object(raw)
        encoded, digest_text, name = map(holder.get, ("bytes", "digest", "imageUrl"))
        if (
            not isinstance(encoded, str)
            or not isinstance(digest_text, str)
            or not isinstance(name, str)
        ):
            raise MalformedManifest("is no manifest holder: lacks bytes, digest or imageUrl")
        try:
            manifest = base64.b64decode(encoded, validate=True)
        except binascii.Error as exc:
            raise MalformedManifest("its bytes are not base64") from exc
        digest = Digest.parse(f"sha256:{digest_text.removeprefix('sha256:')}")
        extractor.take_document(manifest, digest)
        descriptor = Descriptor(_media_type(holder), digest, len(manifest))
        reference = Reference.parse(name)
        if reference.digest not in (None, digest):
            raise MalformedManifest(f"{reference} is not {digest}")
        return NamedImage(descriptor, reference)


def _media_type(holder: dict[str, object]) -> str:
    media_type, kind = holder.get("mediaType"), holder.get("type")
    if isinstance(media_type, str) and media_type:
        return media_type
    if isinstance(kind, int) and 0 <= kind < len(_TYPES):
        return _TYPES[kind]
    raise MalformedManifest("does not say what type the manifest has")
