"""Media types of manifests: which there are, which are worth nothing, how they are written.

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

_MEDIA_TYPE: Final = re.compile(
    r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.A
)
"""RFC 6838 section 4.2: it becomes a header, so nothing else may stand in it."""


def is_generic(media_type: str) -> bool:
    """Whether servers say this that do not know what they have: the document itself knows
    better."""
    return _plain(media_type) in _GENERIC_MEDIA_TYPES


def normalised(media_type: str) -> str:
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
