"""The oras-py backend: an upstream registry over HTTP.

oras' `Registry.do_request` sends a request and answers a 401; everything it should not do is kept
from it: its retry decorator, its Docker credentials file, its container names, its shared token
(see `auth`).
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

from oras.provider import Registry

from ociproxy.errors import (
    BlobUnknown,
    DigestInvalid,
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Listing
from ociproxy.fetch.credential_source import CredentialSource
from ociproxy.fetch.download.connections import Connections
from ociproxy.fetch.oras.auth import RepositoryAuth
from ociproxy.fetch.oras.blob import OrasBlobStream, content_length
from ociproxy.fetch.oras.endpoint import Endpoint
from ociproxy.fetch.oras.errors import refuse, translated
from ociproxy.fetch.oras.session import discard, open_session, read_bounded
from ociproxy.fetch.upstreams.health import Quota
from ociproxy.fetch.verify import media_type_in, verify_manifest
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, json_object
from ociproxy.oci.media_types import ACCEPTED_MEDIA_TYPES, OCI_INDEX, UNKNOWN_MEDIA_TYPE
from ociproxy.oci.reference import Repository

if TYPE_CHECKING:
    import requests

    from ociproxy.config.settings import Fetch, Upstream
    from ociproxy.fetch.download.download import Download
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference

_MANIFESTS: Final = {"Accept": ", ".join(ACCEPTED_MEDIA_TYPES)}
_LISTINGS: Final = {"Accept": f"{OCI_INDEX}, application/json"}
_NAMESPACE: Final = "ns"
_FILTERS: Final = re.compile(r"[A-Za-z]{1,32}(?:, ?[A-Za-z]{1,32}){0,7}")
_HEAD_REFUSED: Final = (405, 501)

# Repository names come from clients, so what is kept for each must be bounded.
_REPOSITORIES: Final = 1024


class OrasBackend:
    """A `Backend` for one upstream; all its threads share one connection pool."""

    def __init__(self, upstream: Upstream, fetch: Fetch) -> None:
        """Raises UpstreamUntrusted if the upstream's certificate files cannot be used."""
        self._upstream = upstream
        self._name = upstream.name
        connections = fetch.fills * upstream.connections + fetch.requests
        self._session = open_session(upstream, connections=connections)
        self._endpoint = Endpoint(upstream, self._session)
        auth = upstream.auth
        self._own_source = None if auth is None else CredentialSource(auth, upstream.server)
        self._lock = threading.Lock()
        self._registry_of = lru_cache(_REPOSITORIES)(self._make_registry)
        self.quota: Quota | None = None

    def resolve(self, reference: Reference) -> Descriptor:
        response = self._request(
            "HEAD", reference.repository, _manifest_path(reference), _MANIFESTS
        )
        if response.status_code in _HEAD_REFUSED:
            discard(response)
            return self.fetch_manifest(reference).descriptor
        self._expect_ok(
            response, reference.repository, ManifestUnknown(reference, "unknown to the upstream")
        )
        discard(response)
        digest = _digest_header(response)
        if digest is None:
            return self.fetch_manifest(reference).descriptor
        expected = reference.digest
        if expected is not None and expected.algorithm == digest.algorithm and expected != digest:
            raise DigestMismatch(f"manifest {reference}", expected, digest)
        media_type = _content_type(response) or UNKNOWN_MEDIA_TYPE
        return Descriptor(media_type, expected or digest, content_length(response) or 0)

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        response = self._request("GET", reference.repository, _manifest_path(reference), _MANIFESTS)
        self._expect_ok(
            response, reference.repository, ManifestUnknown(reference, "unknown to the upstream")
        )
        raw = self._read_document(response)
        expected = reference.digest or _digest_header(response)
        return verify_manifest(
            raw,
            _content_type(response),
            upstream=self._name,
            expected=expected,
            subject=reference,
        )

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        size = self._size_by_head(repository, digest)
        if size is None:
            stream = self.open_blob(repository, digest, stop=1)
            stream.close()
            size = stream.size
        if size is None:
            raise UpstreamUnavailable(self._name, f"does not state the size of blob {digest}")
        return size

    def _size_by_head(self, repository: Repository, digest: Digest) -> int | None:
        """None where a GET may know better."""
        try:
            response = self._request("HEAD", repository, f"blobs/{digest}", {})
        except UpstreamDenied:
            # Storage that the upstream redirects to may have signed the URL for GET only.
            return None
        if response.status_code not in _HEAD_REFUSED:
            self._expect_ok(response, repository, BlobUnknown(digest, "unknown to the upstream"))
        discard(response)
        return content_length(response) if response.ok else None

    def open_blob(
        self, repository: Repository, digest: Digest, *, start: int = 0, stop: int | None = None
    ) -> OrasBlobStream:
        """One GET of a blob, or of its bytes from `start` up to but not including `stop`."""
        ranged = start > 0 or stop is not None
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
        response = self._request("GET", repository, f"blobs/{digest}", headers)
        if response.status_code == 416 and ranged:
            # An empty blob has no range that could be satisfied; nor has one that ends before what
            # has arrived, as when nobody knew its size. The whole tells the size.
            discard(response)
            response = self._request("GET", repository, f"blobs/{digest}", {})
        if response.status_code != 206 or not ranged:
            self._expect_ok(response, repository, BlobUnknown(digest, "unknown to the upstream"))
        return OrasBlobStream(response, self._name, self._upstream.timeouts, start=start)

    def fetch_blob(
        self, repository: Repository, digest: Digest, download: Download, *, tries: int
    ) -> None:
        """Over as many connections as the upstream's entry says, by ranges where they help."""
        download.lead(
            Connections(
                download,
                self._name,
                partial(self.open_blob, repository, digest),
                most=self._upstream.connections,
                tries=tries,
            )
        )

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        target = f"{path}?{query}" if query else path
        response = self._request("GET", repository, target, _LISTINGS)
        unknown = NameUnknown(str(repository), f"the upstream has no {path}")
        self._expect_ok(response, repository, unknown)
        raw = self._read_document(response)
        try:
            json_object(raw)
        except MalformedManifest as exc:
            raise ManifestInvalid(self._name, f"its {path} is {exc}") from exc
        next_url = urljoin(response.url, response.links.get("next", {}).get("url", ""))
        return Listing(
            raw=raw,
            media_type=_content_type(response) or UNKNOWN_MEDIA_TYPE,
            next_query=_own_query(next_url) if "next" in response.links else "",
            filters_applied=_filters_applied(response),
        )

    def close(self) -> None:
        self._session.close()

    def _request(
        self, method: str, repository: Repository, path: str, headers: dict[str, str]
    ) -> requests.Response:
        """An answer of any status, its body not read. The one place that calls oras."""
        url = f"{self._endpoint.base()}{repository.name}/{path}"
        if self._upstream.namespace is not None:
            url += (
                f"{'&' if '?' in path else '?'}{urlencode({_NAMESPACE: self._upstream.namespace})}"
            )
        with self._lock:
            registry = self._registry_of(repository)
        with translated(self._name, self._upstream.timeouts):
            headers = {**headers, **registry.auth.get_auth_header()}
            # Undecorated: the decorator sleeps and tries again on any exception.
            response: requests.Response = Registry.do_request.__wrapped__(
                registry, url, method, headers=headers, stream=True
            )
        self.quota = Quota.parse(response.headers) or self.quota
        return response

    def _make_registry(self, repository: Repository) -> Registry:
        """oras' client for one repository, with authentication of its own and the shared
        connections."""
        registry = Registry()
        registry.session = self._session
        # What the upstream calls it: an endpoint may keep it below another repository.
        prefix = urlsplit(self._endpoint.base()).path.removeprefix("/v2/")
        registry.auth = RepositoryAuth(
            Repository(self._name, f"{prefix}{repository.name}"),
            session=self._session,
            timeouts=self._upstream.timeouts,
            credentials=self._source,
            secure=self._is_secure,
        )
        return registry

    @property
    def _is_secure(self) -> bool:
        return self._endpoint.base().startswith("https:")

    def _source(self) -> CredentialSource | None:
        # That `auto` ended with plain HTTP was not the operator's decision but whoever answers'.
        return None if self._upstream.scheme == "auto" and not self._is_secure else self._own_source

    def _expect_ok(
        self, response: requests.Response, repository: Repository, unknown: OciProxyError
    ) -> None:
        if response.status_code != 200:
            raise refuse(response, self._name, unknown=unknown, repository=repository)

    def _read_document(self, response: requests.Response) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            response.close()
            raise ManifestInvalid(self._name, f"sends a document encoded as {encoding!r}")
        length = content_length(response)
        if length is not None and length > MANIFEST_MAX_SIZE:
            response.close()
            raise ManifestInvalid(self._name, f"a document of {length} bytes is too large")
        with translated(self._name, self._upstream.timeouts, body=True):
            raw = read_bounded(response, MANIFEST_MAX_SIZE + 1)
        if len(raw) > MANIFEST_MAX_SIZE:
            reason = f"a document of more than {MANIFEST_MAX_SIZE} bytes is too large"
            raise ManifestInvalid(self._name, reason)
        return raw


def _content_type(response: requests.Response) -> str:
    return media_type_in(response.headers.get("Content-Type", ""))


def _manifest_path(reference: Reference) -> str:
    """By tag where there is one: with a digest beside it, the two have to agree."""
    return f"manifests/{reference.tag or reference.digest}"


def _own_query(url: str) -> str:
    """The query without the `ns` that a mirror repeats: whoever asks us has another, or none."""
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    return urlencode([(name, value) for name, value in pairs if name != _NAMESPACE])


def _digest_header(response: requests.Response) -> Digest | None:
    try:
        return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
    except DigestInvalid:
        return None


def _filters_applied(response: requests.Response) -> str:
    """What it says is passed on, so it must be the list of words that the specification has."""
    text: str = response.headers.get("OCI-Filters-Applied", "")
    return text if _FILTERS.fullmatch(text) else ""
