"""Manifests: indexes, image manifests and others, parsed to be read and never written anew.

The raw bytes are the manifest. Formats: OCI image-spec (descriptor.md, manifest.md, image-index.md)
and Docker's image manifest v2 schema 2. Any other JSON object is an `OtherManifest`.
`verify_manifest` takes what an upstream sent: header and document must agree on the media type.

Tests: tests/oci/test_manifest.py, tests/fetch/oras/test_backend.py, tests/fetch/contract.py.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Final

from ociproxy.errors import DigestMismatch, ManifestInvalid
from ociproxy.oci.descriptor import (
    ARTIFACT_MEDIA_TYPES,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    IMAGE_MEDIA_TYPES,
    INDEX_MEDIA_TYPES,
    KNOWN_MEDIA_TYPES,
    OCI_INDEX,
    OCI_MANIFEST,
    UNKNOWN_MEDIA_TYPE,
    Descriptor,
    MalformedManifest,
    OddManifest,
    annotations_in,
    is_generic,
    is_media_type,
    normalised,
    text_in,
)
from ociproxy.oci.digest import Digest

MANIFEST_MAX_SIZE: Final = 4 * 1024 * 1024
"""Bytes. The distribution-spec (pushing manifests) asks registries to accept as much, or more."""

_LONG: Final = 256 * 1024
"""Bytes of a document of which one at a time is parsed."""
_parsing = Lock()
_FREE: Final = nullcontext()
_MAX_DESCRIPTORS: Final = 20_000
"""Entries of one list, a guard against hostile documents: 4 MiB have room for more, but no index or
image in use comes near."""

_SMALL: Final = 256 * 1024
"""Bytes of a document that is parsed without counting its containers."""
_MAX_CONTAINERS: Final = 200_000
"""Objects and lists in a document: two bytes, `{}`, become about a hundred in memory."""


@dataclass(frozen=True, slots=True)
class Index:
    """An OCI image index or a Docker manifest list."""

    manifests: tuple[Descriptor, ...]
    """All entries, also those that are blobs."""
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def children(self) -> tuple[Descriptor, ...]:
        """The entries that are manifests."""
        return tuple(each for each in self.manifests if each.is_manifest)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The other entries, each blob once."""
        unique = {each.digest: each for each in self.manifests if not each.is_manifest}
        return tuple(unique.values())


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """An OCI or Docker image manifest, or an artifact in that form."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, each blob once. Those with `urls` are among them: a registry may have
        what another server has, too."""
        return tuple({each.digest: each for each in (self.config, *self.layers)}.values())


@dataclass(frozen=True, slots=True)
class OtherManifest:
    """Any other JSON object that a registry serves as a manifest; passed on as it is. Only
    artifact manifests are known to have `blobs`."""

    blobs: tuple[Descriptor, ...] = ()
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
    """The parsed bytes, if the caller has parsed them."""

    @staticmethod
    def of(
        raw: bytes, media_type: str | None = None, *, algorithm: str = "sha256"
    ) -> ManifestHolder:
        """Describe these bytes; without a media type, by `guess_media_type`. Raises
        MalformedManifest then."""
        return ManifestHolder(
            Descriptor(media_type or guess_media_type(raw), Digest.of(raw, algorithm), len(raw)),
            raw,
        )

    @staticmethod
    def verified(raw: bytes, descriptor: Descriptor) -> ManifestHolder:
        """Compare the bytes with their descriptor. Raises SizeMismatch or DigestMismatch."""
        descriptor.verify(raw, "manifest")
        return ManifestHolder(descriptor, raw)

    @cached_property
    def manifest(self) -> Manifest:
        """The parsed bytes. Raises MalformedManifest."""
        if self.parsed is not None:
            return self.parsed
        return parse_manifest(self.raw, self.descriptor.media_type)


def parse_manifest(raw: bytes, media_type: str) -> Manifest:
    """Raises MalformedManifest if the bytes are no JSON object, or not of this media type; the kind
    OddManifest if only a descriptor is wrong."""
    with parsing(raw):
        return parse_document(json_object(raw), media_type)


def parsing(raw: bytes) -> AbstractContextManager[object]:
    """Held while a document is parsed and the parsed one is in use. A long one swells to twenty
    times its bytes, and threads take no less time for two at once than for one after the other. The
    event loop parses no long one."""
    return _parsing if len(raw) > _LONG else _FREE


def parse_document(document: dict[str, object], media_type: str) -> Manifest:
    """The same for a document whose JSON is parsed."""
    own = media_type_of(document)
    kind = _kind(own) if own == media_type else _checked_kind(document, media_type, own)
    is_artifact = not ARTIFACT_MEDIA_TYPES.isdisjoint((media_type, own))
    return _parse(document, kind, is_artifact=is_artifact)


def _checked_kind(document: dict[str, object], media_type: str, own: str) -> type[Manifest]:
    """Raises MalformedManifest for a document of another kind; `own` is its `media_type_of`."""
    kind, own_kind = _kind(own if is_generic(media_type) else media_type), _kind(own)
    says = _kind(own_media_type(document))
    if own_kind not in (kind, OtherManifest) and (kind, says) != (OtherManifest, OtherManifest):
        # An image that is taken for another kind would count as whole without its layers. But a
        # document whose own type is unknown here may have such fields with other meanings.
        raise MalformedManifest(f"is {own[:100]}, but described as {media_type[:100]}")
    return kind


def _kind(media_type: str) -> type[Manifest]:
    if media_type in INDEX_MEDIA_TYPES:
        return Index
    return ImageManifest if media_type in IMAGE_MEDIA_TYPES else OtherManifest


def _parse(document: dict[str, object], kind: type[Manifest], *, is_artifact: bool) -> Manifest:
    subject = document.get("subject")
    extra = {
        "subject": None if subject is None else Descriptor.from_json(subject),
        "artifact_type": text_in(document.get("artifactType")),
        "annotations": annotations_in(document.get("annotations")),
    }
    if kind is Index:
        return Index(manifests=_descriptors(document, "manifests"), **extra)  # type: ignore[arg-type]
    if kind is ImageManifest:
        layers = _descriptors(document, "layers")
        config = Descriptor.from_json(document.get("config"))
        return ImageManifest(config=config, layers=layers, **extra)  # type: ignore[arg-type]
    blobs = _descriptors(document, "blobs") if is_artifact else ()
    return OtherManifest(blobs=blobs, **extra)  # type: ignore[arg-type]


def referrer_descriptor(holder: ManifestHolder) -> Descriptor:
    """How a referrers list shows this manifest (distribution-spec, listing referrers).

    An image manifest without an artifact type gets the media type of its config. Raises
    MalformedManifest.
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
    """The media type of bytes that came without one: their `mediaType`, else by their fields.

    OCI documents may lack `mediaType`. The image-spec (manifest.md, "mediaType") forbids mixing the
    fields of different kinds, so fields tell the kind. Raises MalformedManifest.
    """
    with parsing(raw):
        return media_type_of(json_object(raw))


def media_type_of(document: dict[str, object]) -> str:
    """The same for a document whose JSON is parsed."""
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
    """The document's `mediaType`, which may be any text; empty if absent or generic."""
    own = normalised(text_in(document.get("mediaType")))
    return "" if is_generic(own) else own


def json_object(raw: bytes) -> dict[str, object]:
    """Parse a JSON object. Raises MalformedManifest, also for more than `_MAX_CONTAINERS`."""
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


def media_type_in(content_type: str) -> str:
    """A Content-Type without its parameters, in lower case; empty if it is no media type. The value
    becomes a header of our answers and a record in the store, so it must be well formed."""
    text = content_type.partition(";")[0].strip().lower()
    return text if is_media_type(text) else ""


def verify_manifest(
    raw: bytes, content_type: str, *, upstream: str, expected: Digest | None, subject: object
) -> ManifestHolder:
    """The manifest in these bytes, parsed here once and for all, unless it is an odd one. A
    mismatch is reported about `subject`. Raises ManifestInvalid for bytes that are no manifest of
    their type, and DigestMismatch for a manifest that is not the expected one."""
    parsed: Manifest | None = None
    try:
        with parsing(raw):
            document = json_object(raw)
            media_type = _agreed_media_type(document, content_type, upstream)
            with suppress(OddManifest):  # its digest tells whether it is what was asked for
                parsed = parse_document(document, media_type)
    except MalformedManifest as exc:
        kind = f" ({content_type[:100]})" if content_type else ""
        reason = f"what it sends{kind} is no manifest: {exc}"
        raise ManifestInvalid(upstream, reason) from exc
    digest = Digest.of(raw, "sha256" if expected is None else expected.algorithm)
    if expected is not None and digest != expected:
        if media_type == DOCKER_SCHEMA1_SIGNED:
            raise ManifestInvalid(
                upstream,
                f"{subject} is a signed Docker schema 1 manifest, whose digest is not that of its "
                "bytes: it cannot be mirrored; push the image anew with a current client",
            )
        raise DigestMismatch(f"manifest {subject}", expected, digest)
    return ManifestHolder(Descriptor(media_type, digest, len(raw)), raw, parsed)


def _agreed_media_type(document: dict[str, object], content_type: str, upstream: str) -> str:
    """The header's type, or the document's if the header's is generic. Raises ManifestInvalid if
    they differ and one of them is a known type."""
    if is_generic(content_type):
        return media_type_of(document)
    own = own_media_type(document)
    if own in ("", content_type):
        return content_type
    if not KNOWN_MEDIA_TYPES.isdisjoint({own, content_type}):
        reason = f"sends a document of type {own[:100]} as {content_type[:100]}"
        raise ManifestInvalid(upstream, reason)
    return content_type
