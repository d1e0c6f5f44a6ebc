"""Records beside content: tags, which repository has a manifest, what refers to what.

Tests: tests/store/test_refs.py, tests/archive/test_bundle.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository


@dataclass(frozen=True, slots=True)
class TagRecord:
    """What a tag resolved to, when (seconds since the epoch), and at which upstream."""

    descriptor: Descriptor
    resolved: float
    upstream: str


@dataclass(frozen=True, slots=True)
class Records:
    """The records of content below the store: tags and manifests by repository, referrers by
    subject."""

    tags: dict[Repository, dict[str, TagRecord]] = field(default_factory=dict)
    manifests: dict[Repository, dict[Digest, Descriptor]] = field(default_factory=dict)
    referrers: dict[Digest, dict[Digest, Descriptor]] = field(default_factory=dict)
