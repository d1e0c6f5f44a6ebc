"""Manifests: descriptors, indexes and image manifests, parsed to look and never re-serialised.

The raw bytes are the manifest. Documents: OCI image-spec (descriptor.md, manifest.md,
image-index.md) and Docker's image manifest v2 schema 2. Whatever else is JSON is passed on
untouched as `OtherManifest`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from ociproxy.errors import DigestInvalid, DigestMismatch, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_ARTIFACT: Final = "application/vnd.oci.artifact.manifest.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"
UNKNOWN_MEDIA_TYPE: Final = "application/json"

_GENERIC_MEDIA_TYPES: Final = frozenset(
    {
        "",
        UNKNOWN_MEDIA_TYPE,
        "application/octet-stream",
        "binary/octet-stream",
        "text/plain",
    }
)

INDEX_MEDIA_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
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
"""What we ask an upstream for; the rest is welcome too, or an unusual artifact could not be
mirrored."""

MANIFEST_MAX_SIZE: Final = 4 * 1024 * 1024
"""Bytes. The distribution-spec (pushing manifests) asks registries to accept at least this much."""

_MEDIA_TYPE: Final = re.compile(
    r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.A
)
"""RFC 6838 section 4.2: it becomes a header, so nothing else may stand in it."""

_HEADER_TEXT: Final = re.compile(r"[ -~]{0,255}")
"""What a descriptor may call a media type: parameters are wrong there, but in use."""

_MAX_DESCRIPTORS: Final = 20_000
"""A 4 MiB document has room for more, and none in use comes near: a guard against hostile
documents."""


_SMALL: Final = 256 * 1024
_MAX_CONTAINERS: Final = 200_000
"""Two bytes that open and close one become a hundred in memory; counted only in what is large."""


class MalformedManifest(ValueError):
    """The bytes are not a manifest; whoever fetched or read them says so in its own words."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a digest points at: media type, digest and size (bytes) travel together."""

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
        """Raises MalformedManifest."""
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
            media_type=_normalised(media_type),
            digest=parsed,
            size=size,
            platform=_platform(value.get("platform")),
            urls=tuple(u for u in urls if isinstance(u, str)) if isinstance(urls, list) else (),
            artifact_type=artifact_type if isinstance(artifact_type, str) else "",
            annotations=_annotations(value.get("annotations")),
        )

    def to_json(self) -> dict[str, object]:
        """The same, for our own records and for referrers answers; empty fields are left out."""
        value: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.platform is not None:
            platform = {"architecture": self.platform.architecture, "os": self.platform.os}
            if self.platform.variant:
                platform["variant"] = self.platform.variant
            value["platform"] = platform
        if self.urls:
            value["urls"] = list(self.urls)
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value


@dataclass(frozen=True, slots=True)
class Index:
    """An OCI image index or a Docker manifest list."""

    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """An OCI or Docker image manifest, artifacts in that form included."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """What a registry holds for this image: each blob once, foreign layers left out."""
        unique = {d.digest: d for d in (self.config, *self.layers) if not d.urls}
        return tuple(unique.values())


@dataclass(frozen=True, slots=True)
class OtherManifest:
    """Any other JSON document a registry keeps as a manifest; passed on as it is."""

    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()


Manifest = Index | ImageManifest | OtherManifest


@dataclass(frozen=True)
class ManifestHolder:
    """A manifest's descriptor and its exact bytes, which match each other."""

    descriptor: Descriptor
    raw: bytes
    parsed: Manifest | None = field(default=None, compare=False, repr=False)
    """What the bytes say, where whoever made this had parsed them anyway."""

    @staticmethod
    def of(
        raw: bytes, media_type: str | None = None, *, algorithm: str = "sha256"
    ) -> ManifestHolder:
        """Name these bytes; without a media type the document's own, or its shape, decides."""
        return ManifestHolder(
            Descriptor(media_type or guess_media_type(raw), Digest.of(raw, algorithm), len(raw)),
            raw,
        )

    @staticmethod
    def verified(raw: bytes, descriptor: Descriptor) -> ManifestHolder:
        """Raises SizeMismatch or DigestMismatch unless the bytes are the descriptor's."""
        if len(raw) != descriptor.size:
            raise SizeMismatch(f"manifest {descriptor.digest}", descriptor.size, len(raw))
        actual = Digest.of(raw, descriptor.digest.algorithm)
        if actual != descriptor.digest:
            raise DigestMismatch("manifest", descriptor.digest, actual)
        return ManifestHolder(descriptor, raw)

    @cached_property
    def manifest(self) -> Manifest:
        """What the bytes say. Raises MalformedManifest."""
        if self.parsed is not None:
            return self.parsed
        return parse_manifest(self.raw, self.descriptor.media_type)


def parse_manifest(raw: bytes, media_type: str) -> Manifest:
    """Raises MalformedManifest for what is not a JSON object, or not what its media type says."""
    return parse_document(json_object(raw), media_type)


def parse_document(document: dict[str, object], media_type: str) -> Manifest:
    """The same of bytes that are parsed already."""
    own = media_type_of(document)
    kind, own_kind = _kind(own if is_generic(media_type) else media_type), _kind(own)
    says = _kind(own_media_type(document))
    if own_kind not in (kind, OtherManifest) and (kind, says) != (OtherManifest, OtherManifest):
        # An image that is taken for anything else would be whole without its layers. What is of a
        # type that nobody knows may have such fields, and mean something else by them.
        raise MalformedManifest(f"is {own[:100]}, but described as {media_type[:100]}")
    return _parse(document, kind)


def _kind(media_type: str) -> type[Manifest]:
    if media_type in INDEX_MEDIA_TYPES:
        return Index
    return ImageManifest if media_type in IMAGE_MEDIA_TYPES else OtherManifest


def _parse(document: dict[str, object], kind: type[Manifest]) -> Manifest:
    subject = document.get("subject")
    extra = {
        "subject": None if subject is None else Descriptor.from_json(subject),
        "artifact_type": _text(document.get("artifactType")),
        "annotations": _annotations(document.get("annotations")),
    }
    if kind is Index:
        return Index(manifests=_descriptors(document, "manifests"), **extra)  # type: ignore[arg-type]
    if kind is ImageManifest:
        config = Descriptor.from_json(document.get("config"))
        return ImageManifest(config=config, layers=_descriptors(document, "layers"), **extra)  # type: ignore[arg-type]
    return OtherManifest(**extra)  # type: ignore[arg-type]


def referrer_descriptor(holder: ManifestHolder) -> Descriptor:
    """How a referrers list shows this manifest (distribution-spec, listing referrers).

    The artifact type is the manifest's own or, for an image manifest without one, its config's
    media type.
    """
    manifest = holder.manifest
    artifact_type = manifest.artifact_type
    if not artifact_type and isinstance(manifest, ImageManifest):
        artifact_type = manifest.config.media_type
    described = holder.descriptor
    return Descriptor(
        described.media_type,
        described.digest,
        described.size,
        artifact_type=artifact_type,
        annotations=manifest.annotations,
    )


def guess_media_type(raw: bytes) -> str:
    """The media type of bytes that came without one: their `mediaType`, else by their shape.

    OCI documents may lack `mediaType`; the fields that tell them apart are those that the
    image-spec (manifest.md, "mediaType") says must not be mixed. Raises MalformedManifest.
    """
    return media_type_of(json_object(raw))


def media_type_of(document: dict[str, object]) -> str:
    """The same of bytes that are parsed already."""
    own = own_media_type(document)
    if is_media_type(own):
        return own
    if document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA1_SIGNED if "signatures" in document else DOCKER_SCHEMA1
    if "manifests" in document:
        return OCI_INDEX
    if "config" in document or "layers" in document:
        return OCI_MANIFEST
    return UNKNOWN_MEDIA_TYPE


def own_media_type(document: dict[str, object]) -> str:
    """What it says of itself, which may be anything; empty where that is nothing."""
    own = _normalised(_text(document.get("mediaType")))
    return "" if is_generic(own) else own


def is_generic(media_type: str) -> bool:
    """Whether servers say this that do not know what they have: the document itself knows
    better."""
    return _plain(media_type) in _GENERIC_MEDIA_TYPES


def _normalised(media_type: str) -> str:
    """A known manifest's media type as it is usually written; others are left as they are."""
    plain = _plain(media_type)
    return plain if plain in KNOWN_MEDIA_TYPES else media_type


def _plain(media_type: str) -> str:
    """Parameters and capitals mean nothing here (RFC 6838 section 4.2), and some tools write
    them."""
    return media_type.partition(";")[0].strip().lower()


def is_media_type(text: str) -> bool:
    """Whether this can stand in a header as a media type without parameters."""
    return _MEDIA_TYPE.fullmatch(text) is not None


def json_object(raw: bytes) -> dict[str, object]:
    """Raises MalformedManifest."""
    if len(raw) > _SMALL and raw.count(b"{") + raw.count(b"[") > _MAX_CONTAINERS:
        raise MalformedManifest(f"more than {_MAX_CONTAINERS} objects and lists")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise MalformedManifest("not JSON") from exc
    if not isinstance(document, dict):
        raise MalformedManifest("not a JSON object")
    return document


def _descriptors(document: dict[str, object], key: str) -> tuple[Descriptor, ...]:
    values = document.get(key)
    # Go's encoder writes an empty list as null.
    if values is None:
        return ()
    if not isinstance(values, list):
        raise MalformedManifest(f"{key} is not a list")
    if len(values) > _MAX_DESCRIPTORS:
        raise MalformedManifest(f"{key} has {len(values)} entries, more than {_MAX_DESCRIPTORS}")
    return tuple(Descriptor.from_json(value) for value in values)


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    os, architecture, variant = (_text(value.get(k)) for k in ("os", "architecture", "variant"))
    return Platform(os, architecture, variant) if os and architecture else None


def _annotations(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        return ()
    return tuple((k, v) for k, v in value.items() if isinstance(v, str))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
