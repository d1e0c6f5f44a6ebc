"""A fetched manifest's media type, which header and document must agree on, and its digest.

Tests: tests/fetch/oras/test_backend.py, tests/fetch/contract.py.
"""

from __future__ import annotations

from ociproxy.errors import DigestMismatch, ManifestInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import (
    ManifestHolder,
    json_object,
    media_type_of,
    own_media_type,
    parse_document,
)
from ociproxy.oci.media_types import (
    DOCKER_SCHEMA1_SIGNED,
    KNOWN_MEDIA_TYPES,
    is_generic,
    is_media_type,
)


def media_type_in(content_type: str) -> str:
    """A Content-Type without its parameters, in lower case; empty if it is no media type. The value
    becomes a header of our answers and a record in the store, so it must be well formed."""
    text = content_type.partition(";")[0].strip().lower()
    return text if is_media_type(text) else ""


def verify_manifest(
    raw: bytes, content_type: str, *, upstream: str, expected: Digest | None, subject: object
) -> ManifestHolder:
    """The manifest in these bytes, parsed here once and for all. A mismatch is reported about
    `subject`. Raises ManifestInvalid for bytes that are no manifest of their type, and
    DigestMismatch for a manifest that is not the expected one."""
    try:
        document = json_object(raw)
        media_type = _agreed_media_type(document, content_type, upstream)
        parsed = parse_document(document, media_type)
    except MalformedManifest as exc:
        reason = f"what it sends as {content_type[:100] or 'a manifest'} is none: {exc}"
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
