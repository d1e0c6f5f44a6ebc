"""The oras-py backend: an upstream registry asked over HTTP.

`client` sends the requests. Here are the requests a `Backend` makes, and what their answers mean.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy.clock import Deadline
from ociproxy.errors import (
    BlobUnknown,
    DigestInvalid,
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamInvalid,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Listing, passed_on
from ociproxy.fetch.download.connections import Connections
from ociproxy.fetch.oras.client import HttpBlobStream, RegistryClient
from ociproxy.fetch.oras.errors import FOREIGN, refuse, translate
from ociproxy.fetch.oras.session import (
    content_encoding,
    content_length,
    discard,
    read_bounded,
    upstream_url,
)
from ociproxy.metrics.counters import UPSTREAM_BYTES
from ociproxy.oci.descriptor import (
    ACCEPTED_MEDIA_TYPES,
    OCI_INDEX,
    UNKNOWN_MEDIA_TYPE,
    Descriptor,
    MalformedManifest,
    is_generic,
)
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, json_object, media_type_in, verify_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    import requests

    from ociproxy.config.settings import Fetch, Upstream
    from ociproxy.fetch.backend import Quota
    from ociproxy.fetch.download.download import Download
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository

T = TypeVar("T")
_MANIFESTS: Final = {"Accept": ", ".join(ACCEPTED_MEDIA_TYPES)}
_LISTINGS: Final = {"Accept": f"{OCI_INDEX}, application/json"}
_FILTERS: Final = re.compile(r"[A-Za-z]{1,32}(?:, ?[A-Za-z]{1,32}){0,7}")
"""The specified value of OCI-Filters-Applied, a list of words. Our answer repeats nothing else."""
_GET_DECIDES: Final = (ManifestUnknown, BlobUnknown, NameUnknown, UpstreamDenied, UpstreamInvalid)
"""What a HEAD is refused with. Some registries answer 400, 403, 404 or 405 to each HEAD, and
storage refuses it by a URL that is signed for GET only: a GET tells what the upstream has."""
_WITHOUT_HEAD: Final = 600.0
"""Seconds for which an upstream is asked by GET alone, after a GET was answered where a HEAD was
not."""
_OUTAGE: Final = 60.0
"""Seconds after a GET failed, too, for which no other follows a HEAD that was answered 5xx: an
outage must not double the requests."""
_QUESTIONS: Final = 2
"""A token and the answer itself. A blob's headers have the time-outs of so many questions together,
redirects and refusals included. The client of a download may leave before."""
_UNKNOWN: Final = "unknown to the upstream"


class _Heads:
    """Whether an upstream answers HEADs of one kind: of manifests, or of blobs."""

    def __init__(self) -> None:
        self._from = 0.0
        """When a HEAD may be sent (monotonic seconds)."""
        self._broken = 0
        """HEADs in a row that were answered 5xx where a GET was answered well."""
        self._gets_from = 0.0
        """When a GET may follow a HEAD that was answered 5xx (monotonic seconds)."""

    @property
    def refused(self) -> bool:
        return time.monotonic() < self._from

    def answered(self) -> None:
        self._broken = 0

    def decided(self, answer: OciProxyError, get: Callable[[], T]) -> T:
        """What `get` returns or raises, after a HEAD with this answer. Raises `answer` if it is a
        5xx and a GET failed, too, within `_OUTAGE`.

        A 5xx may be a moment's: only from the second in a row on GETs alone cost their quota."""
        broken = isinstance(answer, UpstreamUnavailable)
        if broken:
            if time.monotonic() < self._gets_from:
                raise answer
            self._gets_from = time.monotonic() + _OUTAGE  # for other threads, too: one finds out
        try:
            found = get()
        except _GET_DECIDES:
            self._gets_from = 0.0
            raise
        self._gets_from = 0.0
        self._broken += broken
        if not broken or self._broken > 1:
            self._from = time.monotonic() + _WITHOUT_HEAD
        return found


class OrasBackend:
    """A `Backend` for one upstream."""

    def __init__(self, upstream: Upstream, fetch: Fetch) -> None:
        """Raises UpstreamUntrusted if the upstream's certificate files cannot be used."""
        self._upstream = upstream
        self._name = upstream.name
        connections = fetch.fills * upstream.connections + fetch.requests
        self._client = RegistryClient(upstream, connections=connections)
        self._manifest_heads, self._blob_heads = _Heads(), _Heads()

    @property
    def quota(self) -> Quota | None:
        return self._client.quota

    def resolve(self, reference: Reference) -> Descriptor:
        heads = self._manifest_heads
        if heads.refused:
            return self.fetch_manifest(reference).descriptor
        repository, path = reference.repository, _manifest_path(reference)
        response = None
        try:
            response = self._client.request("HEAD", repository, path, _MANIFESTS)
            self._expect_ok(response, repository, ManifestUnknown(reference, _UNKNOWN))
        except (*_GET_DECIDES, UpstreamUnavailable) as exc:
            if response is None and isinstance(exc, UpstreamUnavailable):
                raise
            return heads.decided(exc, lambda: self.fetch_manifest(reference).descriptor)
        discard(response)
        heads.answered()
        digest = _digest_header(response)
        media_type = _content_type(response)
        if digest is None or is_generic(media_type):
            # Only the document tells. What a client is told of a HEAD must be what a GET tells.
            return self.fetch_manifest(reference).descriptor
        expected = reference.digest
        if expected is not None and expected.algorithm == digest.algorithm and expected != digest:
            raise DigestMismatch(f"manifest {reference}", expected, digest)
        return Descriptor(media_type, expected or digest, content_length(response) or 0)

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        response, raw = self._get_document(
            reference.repository,
            _manifest_path(reference),
            _MANIFESTS,
            ManifestUnknown(reference, _UNKNOWN),
        )
        return verify_manifest(
            raw,
            _content_type(response),
            upstream=self._name,
            expected=reference.digest or _digest_header(response),
            subject=reference,
        )

    def fetch_config(self, image: Reference, config: Descriptor) -> bytes:
        stream = self.open_blob(image.repository, config.digest)
        arrived = bytearray()
        try:
            while len(arrived) <= MANIFEST_MAX_SIZE and (piece := stream.read(MANIFEST_MAX_SIZE)):
                arrived += piece
        finally:
            stream.close()
        raw = bytes(arrived)
        config.verify(raw, "blob")
        return raw

    def refusals(self, *_: object) -> dict[Digest, BlobUnknown]:
        """None: it asks for any blob."""
        return {}

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        response, raw = self._get_document(
            repository,
            f"{path}?{query}" if query else path,
            _LISTINGS,
            NameUnknown(str(repository), f"the upstream has no {path}"),
        )
        try:
            json_object(raw)
        except MalformedManifest as exc:
            raise ManifestInvalid(self._name, f"its {path} is {exc}") from exc
        filters = response.headers.get("OCI-Filters-Applied", "")
        link = _next_link(response)
        following = ""
        if link is not None:
            what = "link to the next page"
            following = upstream_url(link, self._name, what=what, base=response.url).query
        return Listing(
            raw=raw,
            media_type=_content_type(response) or UNKNOWN_MEDIA_TYPE,
            next_query=passed_on(following),
            filters_applied=filters if _FILTERS.fullmatch(filters) else "",
        )

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        if self._blob_heads.refused:
            return self._size_by_get(repository, digest)
        response = None
        try:
            response = self._client.request("HEAD", repository, f"blobs/{digest}", {})
            self._expect_ok(response, repository, BlobUnknown(digest, _UNKNOWN))
        except (*_GET_DECIDES, UpstreamUnavailable) as exc:
            if isinstance(exc, BlobUnknown | NameUnknown) and not self._manifest_heads.refused:
                raise  # a mirror behind this one would begin to fetch it for a GET
            if response is None and isinstance(exc, UpstreamUnavailable):
                raise
            return self._blob_heads.decided(exc, lambda: self._size_by_get(repository, digest))
        discard(response)
        self._blob_heads.answered()
        size = content_length(response)
        return self._size_by_get(repository, digest) if size is None else size

    def _size_by_get(self, repository: Repository, digest: Digest) -> int:
        stream = self.open_blob(repository, digest, stop=1)
        stream.close()
        if stream.size is None:
            raise UpstreamUnavailable(self._name, f"does not state the size of blob {digest}")
        return stream.size

    def open_blob(
        self, repository: Repository, digest: Digest, *, start: int = 0, stop: int | None = None
    ) -> HttpBlobStream:
        """One GET of the blob's bytes [start, stop), or to its end where `stop` is None. Raises
        UpstreamError kinds, BlobUnknown or NameUnknown."""
        timeouts = self._upstream.timeouts
        with Deadline.after(_QUESTIONS * (timeouts.connect + timeouts.headers)).kept():
            return self._open_blob(repository, digest, start, stop)

    def _open_blob(
        self, repository: Repository, digest: Digest, start: int, stop: int | None
    ) -> HttpBlobStream:
        path = f"blobs/{digest}"
        ranged = start > 0 or stop is not None
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
        response = self._client.request("GET", repository, path, headers)
        if response.status_code == 416 and ranged:
            # The blob is empty, or shorter than was thought. A GET without range tells its size.
            discard(response)
            response = self._client.request("GET", repository, path, {})
        if response.status_code != 206 or not ranged:
            self._expect_ok(response, repository, BlobUnknown(digest, _UNKNOWN))
        return HttpBlobStream(response, self._upstream, start=start)

    def fetch_blob(self, download: Download, *, tries: int, answered: Callable[[], None]) -> None:
        """Over as many connections as the upstream's entry allows, by ranges where they help."""

        def open_blob(*, start: int, stop: int | None) -> HttpBlobStream:
            stream = self.open_blob(download.repository, download.digest, start=start, stop=stop)
            answered()
            return stream

        most = self._upstream.connections
        download.lead(Connections(download, self._name, open_blob, most=most, tries=tries))

    def close(self) -> None:
        self._client.close()

    def _expect_ok(
        self, response: requests.Response, repository: Repository, unknown: OciProxyError
    ) -> None:
        if response.status_code != 200:
            raise refuse(response, self._name, unknown=unknown, repository=repository)

    def _get_document(
        self, repository: Repository, path: str, headers: dict[str, str], unknown: OciProxyError
    ) -> tuple[requests.Response, bytes]:
        """The answer and its body, of MANIFEST_MAX_SIZE bytes at most. A 404 raises `unknown`."""
        response = self._client.request("GET", repository, path, headers)
        self._expect_ok(response, repository, unknown)
        length = content_length(response)
        if length is not None and length > MANIFEST_MAX_SIZE:
            response.close()
            raise ManifestInvalid(self._name, f"a document of {length} bytes is too large")
        try:
            raw = read_bounded(response, MANIFEST_MAX_SIZE + 1)
        except FOREIGN as exc:
            raise translate(exc, self._name, self._upstream.timeouts, body=True) from exc
        UPSTREAM_BYTES.add(self._upstream.label, by=len(raw))
        if len(raw) > MANIFEST_MAX_SIZE:
            reason = f"a document of more than {MANIFEST_MAX_SIZE} bytes is too large"
            raise ManifestInvalid(self._name, reason)
        encoding = content_encoding(response)
        if encoding and not raw.lstrip().startswith(b"{"):
            raise ManifestInvalid(self._name, f"sends a document encoded as {encoding!r}")
        return response, raw


def _content_type(response: requests.Response) -> str:
    return media_type_in(response.headers.get("Content-Type", ""))


def _next_link(response: requests.Response) -> str | None:
    """The URL of the next page. A link may have several relations (RFC 8288, section 3.3)."""
    for link in response.links.values():
        if "next" in link.get("rel", "").lower().split():
            return str(link["url"])
    return None


def _manifest_path(reference: Reference) -> str:
    """By tag if the reference has one: a digest beside the tag must then agree with the answer."""
    return f"manifests/{reference.tag or reference.digest}"


def _digest_header(response: requests.Response) -> Digest | None:
    try:
        return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
    except DigestInvalid:
        return None
