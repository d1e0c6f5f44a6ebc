"""The cache folder of an ociregistry, versions 1.3 (`blobs/ fat/ img/`) to 1.17 (`blobs/ img/
lts/`).

Blobs are named by the hexadecimal part of their digest. Each manifest is a JSON *holder*: its exact
bytes in base64 under `bytes`, what it was asked for as under `imageUrl`, its digest, and its type
as a media type (1.3) or as a number (later).
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, DigestMismatch, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import NamedImage, open_regular
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, json_object
from ociproxy.oci.media_types import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

    from ociproxy.store.extract import Extractor

_BLOBS: Final = "blobs"
_MANIFESTS: Final = ("fat", "img", "lts")
_TYPES: Final = (DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST)
"""By the number that a holder has as its type."""
_HOLDER_MAX_SIZE: Final = 4 * MANIFEST_MAX_SIZE
"""Bytes: a manifest in base64, and once more in a form of ociregistry's own."""


@dataclass(frozen=True, slots=True)
class CacheFolder:
    root: Path

    @staticmethod
    def is_one(root: Path) -> bool:
        return (root / _BLOBS).is_dir() and any((root / name).is_dir() for name in _MANIFESTS)

    def images(self, extractor: Extractor) -> list[NamedImage]:
        """Give the extractor all manifests, and return what they were asked for as.

        A tag that has moved has an old holder too: the newest has the tag, the others go by digest.
        """
        found: list[NamedImage] = []
        taken: dict[Reference, Digest] = {}
        for where in self._holders():
            try:
                image = self._image(where, extractor)
            except (MalformedManifest, NameInvalid, DigestInvalid, DigestMismatch) as exc:
                nothing = Descriptor(OCI_MANIFEST, Digest.of(b""), 0)
                found.append(NamedImage(nothing, None, problem=f"{where}: {exc}"))
                continue
            reference, digest = image.reference, image.descriptor.digest
            if reference is not None and taken.setdefault(reference, digest) != digest:
                reference = Reference(reference.repository, digest=digest)
            found.append(NamedImage(image.descriptor, reference))
        return found

    def _holders(self) -> list[str]:
        """Their paths, the newest first."""
        times: dict[str, float] = {}
        for folder in _MANIFESTS:
            path = self.root / folder
            if path.is_dir():
                for entry in os.scandir(path):
                    times[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_mtime
        return sorted(times, key=lambda where: (-times[where], where))

    def open_blob(self, digest: Digest) -> FileIO | None:
        """None where it is not there."""
        return open_regular(self.root, f"{_BLOBS}/{digest.encoded}")

    def _image(self, where: str, extractor: Extractor) -> NamedImage:
        file = open_regular(self.root, where)
        if file is None:
            raise MalformedManifest("went away")
        with file:
            raw = file.read(_HOLDER_MAX_SIZE + 1)
        if not raw or len(raw) > _HOLDER_MAX_SIZE:
            raise MalformedManifest(f"is empty or larger than {_HOLDER_MAX_SIZE} bytes")
        holder = json_object(raw)
        texts = {key: holder.get(key) for key in ("bytes", "digest", "imageUrl")}
        encoded, digest_text, name = texts.values()
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
