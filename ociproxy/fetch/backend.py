"""What a backend must do: one upstream registry, asked by some library or program.

Backends are synchronous: they run in threads of their own pools (`upstreams.threads`), never in the
event loop. The caller keeps a `clock.Deadline`, which bounds a short question in all; each request
for a blob's bytes bounds itself. Backends raise the domain errors of `ociproxy.errors` and nothing
else; each library is translated in one place. Every backend's tests inherit the contract.

Tests: tests/fetch/contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import quote, unquote_plus

from ociproxy.errors import (
    ManifestInvalid,
    NameUnknown,
    UpstreamDenied,
    UpstreamInvalid,
)
from ociproxy.oci.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.errors import BlobUnknown
    from ociproxy.fetch.download.download import Download
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository

NAMESPACE: Final = "ns"
"""The query parameter that tells a mirror which registry is meant."""
_AS_IT_IS: Final = "%!$&'()*+,;=:@/?"
"""Characters of a query that need no encoding; `%` is one, for what is encoded stays so."""
NO_SUCH_LISTING: Final = (NameUnknown, UpstreamDenied, UpstreamInvalid, ManifestInvalid)
"""What `fetch_listing` raises where the upstream may lack the referrers API: registries that do not
know it answer 404, and 400, 401, 403, 405, 406 or 501, or a page. The fallback tag tells then."""


def passed_on(query: str) -> str:
    """The query of a list, encoded as it was. `ns` is left out: each mirror sends its own. A `+` in
    an artifact type is written out: media types have many, and upstreams read a space there."""
    kept = []
    for part in filter(None, query.split("&")):
        name = unquote_plus(part.partition("=")[0])
        if name != NAMESPACE:
            kept.append(part.replace("+", "%2B") if name == "artifactType" else part)
    return quote("&".join(kept), safe=_AS_IT_IS)


@dataclass(frozen=True, slots=True)
class Listing:
    """A tags or referrers answer: JSON bytes as they came, and the query of its `rel="next"` link,
    as `passed_on` leaves it, empty where there is none."""

    raw: bytes
    media_type: str
    next_query: str = ""
    filters_applied: str = ""


@dataclass(frozen=True, slots=True)
class Quota:
    """What an upstream says of its rate limit: requests per `window` seconds, None if not said."""

    limit: int
    remaining: int
    window: int | None = None

    @property
    def is_low(self) -> bool:
        return self.remaining * 10 < self.limit


class Backend(Protocol):
    """One upstream registry. Every method blocks and raises UpstreamError kinds, ManifestUnknown,
    BlobUnknown or NameUnknown."""

    @property
    def quota(self) -> Quota | None:
        """What the upstream last said of its rate limit; None where it says nothing. From any
        thread, at once."""

    def resolve(self, reference: Reference) -> Descriptor:
        """HEAD of a manifest: costs no pull quota. A HEAD without an answer raises. Where it is
        refused or answered 5xx, or names no digest or a media type of any file (`is_generic`), or
        where the program knows no HEAD, a GET follows, which costs quota: after a 5xx once in 60 s
        while GETs fail. The size is 0 where the upstream does not say. Also raises
        DigestMismatch."""

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        """GET of a manifest: exact bytes, at most MANIFEST_MAX_SIZE, verified against the
        reference's digest if it has one, else against the Docker-Content-Digest that the upstream
        sends (DigestMismatch)."""

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        """HEAD of a blob: its size in bytes. A HEAD without an answer raises. Where it is refused
        or answered 5xx, or states no size, a GET of one byte follows, as in `resolve`; after a 404
        only where the upstream refuses HEADs of manifests, too."""

    def fetch_blob(self, download: Download, *, tries: int, answered: Callable[[], None]) -> None:
        """Bring the blob of a download into the store: return when it is verified, and committed if
        it is to be kept. Nothing is where the store has no room, and for a relay.

        An HTTP backend calls `download.lead` with its connections; another one adopts the whole
        blob (`Blobs.adopt`), and the download finds it there.
        The backend tells `download` the size as soon as it is known, and ends soon once
        `download.stopped` is set. `tries` is how often in a row a connection may break without
        having brought anything; with 1 the first one that breaks ends the call.
        `answered` is called once the upstream has begun to send the blob, and not where another
        process brings it. Also raises IntegrityError kinds, BlobTooLarge and StoreError.
        """

    def fetch_config(self, image: Reference, config: Descriptor) -> bytes:
        """The config of an image manifest, which `image` names by digest, without the blobs beside
        it: verified, and of MANIFEST_MAX_SIZE bytes at most. Also raises IntegrityError kinds."""

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        """GET of `/v2/<name>/<path>?<query>`: `tags/list` or `referrers/<digest>`, at most
        MANIFEST_MAX_SIZE bytes of JSON. A 404 is NameUnknown."""

    def refusals(
        self, repository: Repository, manifests: Iterable[ManifestHolder], blobs: Iterable[Digest]
    ) -> dict[Digest, BlobUnknown]:
        """Of these blobs, which the manifests name, those that this backend never brings, whatever
        the upstream has, with what `fetch_blob` raises. Asks no upstream. Raises StoreError."""

    def close(self) -> None:
        """Drop the idle connections."""


class BlobStream(Protocol):
    """The body of one blob request, undecoded bytes, read by one thread; `abort` may come from
    another."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole blob as the upstream states them, or None where it does not."""

    @property
    def start(self) -> int:
        """Offset of the first byte of the body: 0 where the upstream ignored the range."""

    @property
    def stop(self) -> int | None:
        """Offset just past the last byte of the body, or None where the upstream does not say."""

    @property
    def encoding(self) -> str:
        """What the upstream says that the bytes are encoded with; empty for nothing. The digest
        tells whether they are."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, as soon as some are there; b"" at the end. Raises
        UpstreamUnavailable when the connection breaks, stalls, or ends before the stated length."""

    def abort(self) -> None:
        """Make a blocked read return soon; safe from any thread, at any time, more than once."""

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else drop it."""


class OpenBlob(Protocol):
    """Ask for the bytes [start, stop) of the blob; to its end where stop is None."""

    def __call__(self, *, start: int, stop: int | None) -> BlobStream: ...
