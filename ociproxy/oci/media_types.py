"""Media types of manifests: the known ones, the generic ones, and how each is spelled.

Tests: tests/oci/test_manifest.py.
"""

from __future__ import annotations

import re
from typing import Final

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_ARTIFACT: Final = "application/vnd.oci.artifact.manifest.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"
UNKNOWN_MEDIA_TYPE: Final = "application/json"

_GENERIC_MEDIA_TYPES: Final = frozenset(
    {"", UNKNOWN_MEDIA_TYPE, "application/octet-stream", "binary/octet-stream", "text/plain"}
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
"""Media types for the Accept header of a request to an upstream. `*/*` lets it answer with a type
that is unknown here, or unusual artifacts could not be mirrored."""

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


def _plain(media_type: str) -> str:
    """Without parameters, in lower case. Neither has a meaning here (RFC 6838 section 4.2), and
    some tools write them."""
    return media_type.partition(";")[0].strip().lower()


def is_media_type(text: str) -> bool:
    """Whether the text is a media type without parameters, which can stand in a header."""
    return _MEDIA_TYPE.fullmatch(text) is not None
