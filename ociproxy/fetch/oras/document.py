"""What a manifest answer is: its media type from header and document, which must agree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from ociproxy.errors import ManifestInvalid
from ociproxy.manifest import (
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    GENERIC_MEDIA_TYPES,
    IMAGE_MEDIA_TYPES,
    INDEX_MEDIA_TYPES,
    OCI_ARTIFACT,
    MalformedManifest,
    ManifestHolder,
    guess_media_type,
)

if TYPE_CHECKING:
    import requests

_KNOWN: Final = (
    INDEX_MEDIA_TYPES | IMAGE_MEDIA_TYPES | {OCI_ARTIFACT, DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED}
)


def media_type_of(response: requests.Response) -> str:
    """The Content-Type without its parameters; empty where there is none."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def holder_of(raw: bytes, media_type: str, *, upstream: str, algorithm: str) -> ManifestHolder:
    """Raises ManifestInvalid for what is no manifest, or not the one that it says."""
    try:
        own = own_media_type(raw)
        if media_type in GENERIC_MEDIA_TYPES:
            media_type = guess_media_type(raw)
        elif own and own != media_type and not _KNOWN.isdisjoint({own, media_type}):
            reason = f"sends a document of type {own[:100]} as {media_type[:100]}"
            raise ManifestInvalid(upstream, reason)
        holder = ManifestHolder.of(raw, media_type, algorithm=algorithm)
        _ = holder.manifest  # parsed now, so that no malformed one is stored
    except MalformedManifest as exc:
        reason = f"what it sends as {media_type[:100] or 'a manifest'} is none: {exc}"
        raise ManifestInvalid(upstream, reason) from exc
    return holder


def own_media_type(raw: bytes) -> str:
    """The document's `mediaType`; empty where it has none. Raises MalformedManifest."""
    if not is_json_object(raw):
        raise MalformedManifest("not a JSON object")
    value = json.loads(raw).get("mediaType")
    return value if isinstance(value, str) else ""


def is_json_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False
