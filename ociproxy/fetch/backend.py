"""What a backend must do: one upstream registry, asked by some library or program.

Backends are synchronous: they run in threads of their own pools (`upstreams.threads`), never in the
event loop. The caller keeps a `clock.Deadline`, which bounds a short question in all; each request
for a blob's bytes bounds itself. Backends raise the domain errors of `ociproxy.errors` and nothing
else; each library is translated in one place. Every backend's tests inherit the contract.

Tests: tests/fetch/contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ociproxy.fetch.download.download import Download
    from ociproxy.fetch.upstreams.health import Quota
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository


@dataclass(frozen=True, slots=True)
class Listing:
    """A tags or referrers answer: JSON bytes as they came, and the query of its `rel="next"` link,
    empty where there is none."""

    raw: bytes
    media_type: str
    next_query: str = ""
    filters_applied: str = ""


class Backend(Protocol):
    """One upstream registry. Every method blocks and raises UpstreamError kinds, ManifestUnknown,
    BlobUnknown or NameUnknown."""

    @property
    def quota(self) -> Quota | None:
        """What the upstream last said of its rate limit; None where it says nothing. From any
        thread, at once."""

    def resolve(self, reference: Reference) -> Descriptor:
        """HEAD of a manifest: costs no pull quota. The size is 0 where the upstream does not
        say."""

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        """GET of a manifest: exact bytes, at most MANIFEST_MAX_SIZE, verified against the
        reference's digest if it has one, else against the Docker-Content-Digest that the upstream
        sends (DigestMismatch)."""

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        """HEAD of a blob: its size in bytes."""

    def fetch_blob(
        self, repository: Repository, digest: Digest, download: Download, *, tries: int
    ) -> None:
        """Bring a blob into the store: return when it is verified and committed.

        The backend tells `download` the size as soon as it is known, and ends soon once
        `download.stopped` is set. `tries` is how often in a row a connection may break without
        having brought anything; with 1 the first one that breaks ends the call. Also raises
        IntegrityError kinds, BlobTooLarge and StoreError.
        """

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        """GET of `/v2/<name>/<path>?<query>`: `tags/list` or `referrers/<digest>`, at most
        MANIFEST_MAX_SIZE bytes of JSON. A 404 is NameUnknown."""

    def close(self) -> None:
        """Drop the idle connections."""
