"""Descriptors: what a digest points at (OCI image-spec, descriptor.md); and the media types of
manifests, the known and the generic ones.

Tests: tests/oci/test_manifest.py."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple, TypeGuard

from ociproxy.errors import DigestInvalid, DigestMismatch, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_ARTIFACT: Final = "application/vnd.oci.artifact.manifest.v1+json"
ORAS_ARTIFACT: Final = "application/vnd.cncf.oras.artifact.manifest.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"
OS_VERSION: Final = "os.version"
"""Key of a platform, and of an image's config (image-spec, image-index.md)."""
IMAGE_CONFIGS: Final = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
"""Media types of configs that tell the platform of an image."""
UNKNOWN_MEDIA_TYPE: Final = "application/json"

_GENERIC_MEDIA_TYPES: Final = frozenset(
    {"", UNKNOWN_MEDIA_TYPE, "application/octet-stream", "binary/octet-stream", "text/plain"}
)

INDEX_MEDIA_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
ARTIFACT_MEDIA_TYPES: Final = frozenset({OCI_ARTIFACT, ORAS_ARTIFACT})
"""Documents that have `blobs` in the place of layers."""
IMAGE_MEDIA_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
KNOWN_MEDIA_TYPES: Final = (
    INDEX_MEDIA_TYPES | IMAGE_MEDIA_TYPES | {OCI_ARTIFACT, DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED}
)

ACCEPTED_MEDIA_TYPES: Final = (
    OCI_INDEX,
    OCI_MANIFEST,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_ARTIFACT,
    DOCKER_SCHEMA1_SIGNED,
    "*/*;q=0.1",
)
"""Media types for the Accept header of a request to an upstream. `*/*` lets it answer with a type
that is unknown here, or unusual artifacts could not be mirrored."""

_SOUNDS_LIKE_A_MANIFEST: Final = re.compile(r"json$|manifest|index")
_NONDISTRIBUTABLE: Final = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.nondistributable\.v1\.tar(?:\+(?:gzip|zstd))?"
    r"|docker\.image\.rootfs\.foreign\.diff\.tar(?:\.gzip)?)"
)
"""Layers that a registry need not have, as the base layers of old Windows images."""

_MEDIA_TYPE: Final = re.compile(
    r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.A
)
"""RFC 6838 section 4.2. A media type becomes a header, so it must not hold other characters."""


def is_generic(media_type: str) -> bool:
    """Whether servers give this media type to any file. It says nothing then, and the document's
    own type is the better one."""
    return _plain(media_type) in _GENERIC_MEDIA_TYPES


def normalised(media_type: str) -> str:
    """The usual spelling of a known manifest's media type; others stay as they are."""
    plain = _plain(media_type)
    return plain if plain in KNOWN_MEDIA_TYPES else media_type


def is_manifest(media_type: str) -> bool:
    """Whether an entry of an index with this media type is a manifest. BuildKit exports its cache
    as an index of layers, which a registry has as blobs."""
    short = len(media_type) <= _LONGEST
    return _is_manifest(media_type) if short else _is_manifest.__wrapped__(media_type)


@lru_cache(maxsize=1024)
def _is_manifest(media_type: str) -> bool:
    plain = _plain(media_type)
    return plain in _GENERIC_MEDIA_TYPES or (
        plain not in IMAGE_CONFIGS and _SOUNDS_LIKE_A_MANIFEST.search(plain) is not None
    )


def _plain(media_type: str) -> str:
    """Without parameters, in lower case. Neither has a meaning here (RFC 6838 section 4.2), and
    some tools write them."""
    return _cut(media_type) if len(media_type) <= _LONGEST else _cut.__wrapped__(media_type)


@lru_cache(maxsize=1024)
def _cut(media_type: str) -> str:
    # A walk asks for each descriptor of each manifest. Some dozen media types are in use.
    return media_type.partition(";")[0].strip().lower()


def is_media_type(text: str) -> bool:
    """Whether the text is a media type without parameters, which can stand in a header."""
    return _MEDIA_TYPE.fullmatch(text) is not None


_LONGEST: Final = 255
"""Characters of a media type in a descriptor."""
_HEADER_TEXT: Final = re.compile(rf"[ -~]{{0,{_LONGEST}}}")
"""Text that a descriptor may give as media type. The spec allows no parameters, but they occur."""


class MalformedManifest(ValueError):
    """The bytes are not a manifest. Callers translate it into an error that names the source."""


class OddManifest(MalformedManifest):
    """A document of the right kind, of which a descriptor cannot be read: clients may know what to
    do with it, so it is served as it is. It cannot be walked."""


class Descriptor(NamedTuple):
    """Media type, digest and size (bytes) of a manifest or blob. They stay together: the size is
    the first check of the content, the digest the second. A tuple as a digest is, which is made in
    a fifth of the time."""

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

    @property
    def is_artifact(self) -> bool:
        return self.media_type in ARTIFACT_MEDIA_TYPES

    @property
    def is_manifest(self) -> bool:
        return is_manifest(self.media_type)

    @property
    def is_nondistributable(self) -> bool:
        return _NONDISTRIBUTABLE.fullmatch(_plain(self.media_type)) is not None

    def verify(self, raw: bytes, kind: str) -> None:
        """Raises SizeMismatch or DigestMismatch where these are not the bytes of this `kind` of
        content."""
        if len(raw) != self.size:
            raise SizeMismatch(f"{kind} {self.digest}", self.size, len(raw))
        actual = Digest.of(raw, self.digest.algorithm)
        if actual != self.digest:
            raise DigestMismatch(kind, self.digest, actual)

    @staticmethod
    def from_json(value: object) -> Descriptor:
        """Parse a descriptor. Optional fields of a wrong type count as absent. Raises
        OddManifest if media type, digest or size is absent or wrong."""
        if not isinstance(value, dict):
            raise OddManifest("a descriptor is not an object")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not isinstance(digest, str):
            raise OddManifest("a descriptor lacks mediaType or digest")
        if not is_size(size):
            raise OddManifest(f"descriptor {digest[:100]}: size is not a count of bytes")
        bare = _bare(media_type, digest, size)
        if len(value) == _FIELDS:
            return bare
        urls = value.get("urls")
        artifact_type = value.get("artifactType")
        return Descriptor(
            bare.media_type,
            bare.digest,
            size,
            platform_in(value.get("platform")),
            tuple(u for u in urls if isinstance(u, str)) if isinstance(urls, list) else (),
            artifact_type if isinstance(artifact_type, str) else "",
            annotations_in(value.get("annotations")),
        )

    def to_json(self) -> dict[str, object]:
        """The JSON object for records of the store and lists of referrers, without empty fields."""
        value: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if (place := self.platform) is not None:
            more = {"variant": place.variant, OS_VERSION: place.os_version}
            value["platform"] = {
                "architecture": place.architecture,
                "os": place.os,
                **{name: each for name, each in more.items() if each},
            }
        optional = {
            "urls": list(self.urls),
            "artifactType": self.artifact_type,
            "annotations": dict(self.annotations),
        }
        return value | {name: each for name, each in optional.items() if each}


_FIELDS: Final = 3
"""Of a descriptor that has none but those which it must have."""


@lru_cache(maxsize=4096)
def _bare(media_type: str, digest: str, size: int) -> Descriptor:
    """Images share most layers, so most descriptors have been seen. Raises OddManifest."""
    if not _HEADER_TEXT.fullmatch(media_type):
        raise OddManifest(f"descriptor {digest[:100]}: mediaType is no media type")
    try:
        return Descriptor(normalised(media_type), Digest.parse(digest), size)
    except DigestInvalid as exc:
        raise OddManifest(str(exc)) from exc


def platform_in(value: object) -> Platform | None:
    """The platform of an entry of an index, or of an image's config; None where it names none, as
    the config of a signature."""
    if not isinstance(value, dict):
        return None
    system, architecture = value.get("os"), value.get("architecture")
    variant, version = value.get("variant", ""), value.get(OS_VERSION, "")
    # An artifact's config is a blob of any content, with other JSON types in these fields.
    if not (isinstance(system, str) and isinstance(architecture, str)):
        return None
    if not (isinstance(variant, str) and isinstance(version, str) and system and architecture):
        return None
    return Platform(system, architecture, variant, version)


def annotations_in(value: object) -> tuple[tuple[str, str], ...]:
    """The entries of a JSON object whose values are texts; none for any other value."""
    if not isinstance(value, dict):
        return ()
    return tuple((k, v) for k, v in value.items() if isinstance(v, str))


def is_size(value: object) -> TypeGuard[int]:
    """Whether it is a count of bytes, of 63 bits as the image-spec says. JSON has numbers of
    thousands of digits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def text_in(value: object) -> str:
    return value if isinstance(value, str) else ""
