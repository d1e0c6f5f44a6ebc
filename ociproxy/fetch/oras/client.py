"""Requests to the registry API of one upstream: their URLs, their credentials, and oras.

oras' `Registry.do_request` sends a request and answers a 401. Four other habits of oras are kept
out: its retries, Docker's credentials file, its image names, and one token for all repositories
(see `auth`).

`HttpBlobStream` is the body of one answer to a blob request: where it lies in the blob, and its
bytes.

Tests: tests/fetch/oras/test_backend.py, tests/fetch/oras/test_tls.py,
tests/fetch/oras/test_connect.py.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode, urljoin, urlsplit

from ociproxy.fetch.oras.provider import Registry  # first: it imports requests

# isort: split
from requests.exceptions import ConnectionError

from ociproxy.clock import time_left
from ociproxy.errors import (
    Interrupted,
    OciProxyError,
    UpstreamDenied,
    UpstreamError,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.backend import NAMESPACE, Quota
from ociproxy.fetch.credential_helper import CredentialSource
from ociproxy.fetch.oras.auth import RepositoryAuth, RepositorySession
from ociproxy.fetch.oras.challenges import Challenge, find_challenge
from ociproxy.fetch.oras.errors import FOREIGN, translate
from ociproxy.fetch.oras.session import content_encoding, content_length, discard, open_session
from ociproxy.metrics.counters import UPSTREAM_BYTES, UPSTREAM_REQUESTS, UPSTREAM_SECONDS
from ociproxy.oci.reference import Repository

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

    from ociproxy.config.settings import Upstream


_REPOSITORIES: Final = 1024
"""Repositories whose tokens are kept. Clients choose the names, so the number must be bounded."""
_PING_INTERVAL: Final = 600.0
"""Seconds for which the answer of `/v2/` is used."""


_QUOTA_FIELD: Final = re.compile(r"(\d{1,15})\s*(?:;\s*w\s*=\s*(\d{1,9}))?(?:[;,].*)?")
_UNCHALLENGED: Final = (400, 404, 405)
"""Besides 401 and 403: answers to a request that may lack credentials."""


class RegistryClient:
    """Thread-safe. All threads share one pool of connections; each repository has its tokens."""

    def __init__(self, upstream: Upstream, *, connections: int) -> None:
        """`connections` is how many idle ones to a host are kept. Raises UpstreamUntrusted if the
        upstream's certificate files cannot be used."""
        self._upstream = upstream
        self._name = upstream.name
        self._session = open_session(upstream, connections=connections)
        self._credentials = (
            None if upstream.auth is None else CredentialSource(upstream.auth, upstream.server)
        )
        self._bases = tuple(api_base(url) for url in upstream.urls)
        self._base: str | None = self._bases[0] if len(self._bases) == 1 else None
        self._probing = threading.Lock()
        self._making = threading.Lock()
        self._registry_of = lru_cache(_REPOSITORIES)(self._make_registry)
        self._pinged: Challenge | None = None
        self._ping_at = 0.0
        self.quota: Quota | None = None

    def request(
        self, method: str, repository: Repository, path: str, headers: dict[str, str]
    ) -> requests.Response:
        """The answer to one request, of any status, its body not read. `path` follows the
        repository's name and may have a query. Raises UpstreamError kinds."""
        try:
            url = f"{self._base_url()}{repository.name}/{path}"
            if self._upstream.namespace is not None:
                separator = "&" if "?" in path else "?"
                url += f"{separator}{urlencode({NAMESPACE: self._upstream.namespace})}"
            with self._making:  # two threads must not make a token each
                registry = self._registry_of(repository)
            response = self._ask(registry, method, url, headers)
        except FOREIGN as exc:
            raise translate(exc, self._name, self._upstream.timeouts) from exc
        self.quota = quota_in(response.headers) or self.quota
        return response

    def close(self) -> None:
        self._session.close()

    def _ask(
        self, registry: Registry, method: str, url: str, headers: dict[str, str]
    ) -> requests.Response:
        """Some registries challenge at `/v2/` only: without credentials they answer 404 or 403, or
        another status that is no challenge."""
        try:
            response = self._send(registry, method, url, headers)
        except UpstreamDenied:
            if not self._log_in(registry, url):
                raise
        else:
            if response.status_code not in _UNCHALLENGED or not self._log_in(registry, url):
                return response
            discard(response)
        return self._send(registry, method, url, headers)

    def _send(
        self, registry: Registry, method: str, url: str, headers: dict[str, str]
    ) -> requests.Response:
        began, status = time.monotonic(), "error"
        try:
            response = _send(registry, method, url, headers)
            status = _status_class(response.status_code)
        except UpstreamDenied as exc:
            status = _status_class(exc.status)
            raise
        finally:
            UPSTREAM_REQUESTS.add(self._upstream.label, status)
            UPSTREAM_SECONDS.add(self._upstream.label, by=time.monotonic() - began)
        return response

    def _log_in(self, registry: Registry, url: str) -> bool:
        """Make such requests carry credentials as `/v2/` asks for them. False where no credentials
        are configured, they were asked for already, or `/v2/` does not ask for any."""
        challenge = self._challenge() if registry.auth.is_unchallenged(url) else None
        if challenge is not None:
            registry.auth.meet(challenge, url)
        return challenge is not None

    def _challenge(self) -> Challenge | None:
        """How `/v2/` asks for credentials, if it does; it was asked in the last ten minutes."""
        timeouts = self._upstream.timeouts
        if not self._probing.acquire(timeout=time_left(timeouts.connect + timeouts.headers)):
            raise UpstreamUnavailable(self._name, "timed out waiting for /v2/", timed_out=True)
        try:
            if time.monotonic() >= self._ping_at:
                response = self._session.get(urljoin(self._base or "", "/v2/"), stream=True)
                discard(response)
                header = response.headers.get("Www-Authenticate", "")
                self._pinged = find_challenge(header) if response.status_code == 401 else None
                self._ping_at = time.monotonic() + _PING_INTERVAL
            return self._pinged
        finally:
            self._probing.release()

    def _base_url(self) -> str:
        """The first of the upstream's URLs that speaks HTTP, found once, ending with a slash. With
        scheme `auto`, HTTPS is tried before plain HTTP. Raises UpstreamError kinds."""
        if self._base is not None:
            return self._base
        timeouts = self._upstream.timeouts
        if not self._probing.acquire(timeout=time_left(timeouts.connect + timeouts.headers)):
            raise UpstreamUnavailable(self._name, "timed out finding its scheme", timed_out=True)
        try:
            if self._base is None:
                self._base = self._find_base()
            return self._base
        finally:
            self._probing.release()

    def _find_base(self) -> str:
        """Sends no credentials: it is not known yet who answers."""
        error: OciProxyError | None = None
        for base in self._bases:
            try:
                discard(self._session.get(base, stream=True))
            except FOREIGN as exc:
                failed = translate(exc, self._name, self._upstream.timeouts)
                if not isinstance(exc, ConnectionError) or isinstance(failed, UpstreamUntrusted):
                    # It speaks TLS. Neither its certificate nor a late answer leads to plain HTTP.
                    raise failed from exc
                error = error or failed
            else:
                return base
        raise error or UpstreamUnavailable(self._name, "has no URL")

    def _make_registry(self, repository: Repository) -> Registry:
        """oras' client for one repository, on the shared connections."""
        base = self._base_url()
        secure = base.startswith("https:")
        # With `auto`, plain HTTP was chosen by the answers on the network, not by the operator.
        trusted = secure or self._upstream.scheme != "auto"
        # In the upstream's words: its endpoint may keep the repository below another name.
        prefix = urlsplit(base).path.removeprefix("/v2/")
        known_as = Repository(self._name, f"{prefix}{repository.name}")
        timeouts = self._upstream.timeouts
        registry = Registry()
        registry.session = RepositorySession(known_as, session=self._session, timeouts=timeouts)
        registry.auth = RepositoryAuth(
            known_as,
            session=self._session,
            timeouts=timeouts,
            credentials=self._credentials if trusted else None,
            secure=secure,
        )
        return registry


def _send(registry: Registry, method: str, url: str, headers: dict[str, str]) -> requests.Response:
    # The decorator around `do_request` sleeps and repeats after any exception.
    headers = {**headers, **registry.auth.get_auth_header(url)}
    response: requests.Response = Registry.do_request.__wrapped__(
        registry, url, method, headers=headers, stream=True
    )
    return response


def quota_in(headers: Mapping[str, str]) -> Quota | None:
    """From Docker Hub's headers `ratelimit-limit: 100;w=21600` and `ratelimit-remaining`; None if
    one is absent or no number. `headers` must ignore case."""
    limit = _QUOTA_FIELD.fullmatch(headers.get("ratelimit-limit", "").strip())
    remaining = _QUOTA_FIELD.fullmatch(headers.get("ratelimit-remaining", "").strip())
    if limit is None or remaining is None:
        return None
    window = remaining[2] or limit[2]
    return Quota(int(limit[1]), int(remaining[1]), None if window is None else int(window))


def _status_class(status: int) -> str:
    return "429" if status == 429 else f"{status // 100}xx"


def api_base(url: str) -> str:
    """The URL that a repository's name follows, ending with a slash. `https://host` becomes
    `https://host/v2/`. A path is where a proxying registry keeps the upstream: `https://host/hub`
    becomes `https://host/v2/hub/`. A path below `/v2` stays."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if path != "v2" and not path.startswith("v2/"):
        path = f"v2/{path}".rstrip("/")
    return f"{parts.scheme}://{parts.netloc}/{path}/"


_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_READ_LIMIT: Final = 1024 * 1024
"""Bytes that a read allocates. More cost more than the saved calls bring (measured, loopback)."""


class HttpBlobStream:
    """A `BlobStream` over the response of a GET."""

    def __init__(self, response: requests.Response, upstream: Upstream, *, start: int) -> None:
        """The body must be the blob from `start` or 0 on. Else this closes the response and raises
        UpstreamUnavailable."""
        self._response = response
        self._upstream = upstream.name
        self._label = upstream.label
        self._timeouts = upstream.timeouts
        self.encoding = content_encoding(response)
        self._read = 0
        self._aborted = False
        try:
            self.start, self.stop, self.size = self._extent(start)
        except UpstreamError:
            response.close()
            raise

    def read(self, limit: int) -> bytes:
        try:
            # `read` would wait for all of `limit`.
            data: bytes = self._response.raw.read1(min(limit, _READ_LIMIT), decode_content=False)
        except (*FOREIGN, ValueError, AttributeError) as exc:
            # `abort` from another thread makes ssl and http.client raise the last two.
            if self._aborted or not isinstance(exc, FOREIGN):
                raise Interrupted(self._upstream, "read was aborted") from exc
            raise translate(exc, self._upstream, self._timeouts, body=True) from exc
        if self._aborted:
            # These bytes are not data: a TLS socket that was shut down gives encrypted bytes.
            raise Interrupted(self._upstream, "read was aborted")
        self._read += len(data)
        UPSTREAM_BYTES.add(self._label, by=len(data))
        if not data and self.stop is not None and self.start + self._read != self.stop:
            reason = f"connection closed at byte {self.start + self._read} of {self.stop}"
            raise UpstreamUnavailable(self._upstream, reason)
        return data

    def abort(self) -> None:
        self._aborted = True
        # These say that the body has ended or the response is closed: no read is to be woken.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.raw.shutdown()

    def close(self) -> None:
        self._response.close()

    def _extent(self, asked: int) -> tuple[int, int | None, int | None]:
        """Offsets in the blob where the body starts and stops, and the size of the blob, in bytes;
        None for what the upstream does not say. `asked` is the start of the requested range."""
        headers = self._response.headers
        length = content_length(self._response)
        if self._response.status_code != 206:
            return 0, length, length
        given = headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(given.strip())
        if match is None or int(match[1]) != asked:
            reason = f"answers a request for bytes {asked}- with the range {given[:80]!r}"
            raise UpstreamUnavailable(self._upstream, reason)
        return asked, int(match[2]) + 1, None if match[3] == "*" else int(match[3])
