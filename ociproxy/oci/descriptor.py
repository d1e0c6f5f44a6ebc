"""Descriptors: what a digest points at (OCI image-spec, descriptor.md).

Tests: tests/oci/test_manifest.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ociproxy.errors import DigestInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.media_types import IMAGE_MEDIA_TYPES, INDEX_MEDIA_TYPES, normalised
from ociproxy.oci.platform import Platform

_HEADER_TEXT: Final = re.compile(r"[ -~]{0,255}")
"""Text that a descriptor may give as media type. The spec allows no parameters, but they occur."""


class MalformedManifest(ValueError):
    """The bytes are not a manifest. Callers translate it into an error that names the source."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Media type, digest and size (bytes) of a manifest or blob. They stay together: the size is
    the first check of the content, the digest the second."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    urls: tuple[str, ...] = ()
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def is_index(self) -> bool:
        return self.media_type in INDEX_MEDIA_TYPES

    @property
    def is_image(self) -> bool:
        return self.media_type in IMAGE_MEDIA_TYPES

    @staticmethod
    def from_json(value: object) -> Descriptor:
        """Parse a descriptor. Optional fields of a wrong type count as absent. Raises
        MalformedManifest if media type, digest or size is absent or wrong."""
        if not isinstance(value, dict):
            raise MalformedManifest("a descriptor is not an object")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not isinstance(digest, str):
            raise MalformedManifest("a descriptor lacks mediaType or digest")
        if not _HEADER_TEXT.fullmatch(media_type):
            raise MalformedManifest(f"descriptor {digest[:100]}: mediaType is no media type")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise MalformedManifest(f"descriptor {digest[:100]}: size is not a count of bytes")
        try:
            parsed = Digest.parse(digest)
        except DigestInvalid as exc:
            raise MalformedManifest(str(exc)) from exc
        urls = value.get("urls")
        artifact_type = value.get("artifactType")
        return Descriptor(
            media_type=normalised(media_type),
            digest=parsed,
            size=size,
            platform=_platform(value.get("platform")),
            urls=tuple(u for u in urls if isinstance(u, str)) if isinstance(urls, list) else (),
            artifact_type=artifact_type if isinstance(artifact_type, str) else "",
            annotations=annotations_in(value.get("annotations")),
        )

    def to_json(self) -> dict[str, object]:
        """The JSON object for records of the store and lists of referrers, without empty fields."""
        value: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if (place := self.platform) is not None:
            variant = {"variant": place.variant} if place.variant else {}
            value["platform"] = {"architecture": place.architecture, "os": place.os, **variant}
        optional = {
            "urls": list(self.urls),
            "artifactType": self.artifact_type,
            "annotations": dict(self.annotations),
        }
        return value | {name: each for name, each in optional.items() if each}


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    os, architecture, variant = (text_in(value.get(k)) for k in ("os", "architecture", "variant"))
    return Platform(os, architecture, variant) if os and architecture else None


def annotations_in(value: object) -> tuple[tuple[str, str], ...]:
    """The entries of a JSON object whose values are texts; none for any other value."""
    if not isinstance(value, dict):
        return ()
    return tuple((k, v) for k, v in value.items() if isinstance(v, str))


def text_in(value: object) -> str:
    return value if isinstance(value, str) else ""
