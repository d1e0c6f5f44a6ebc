"""The HTTP session of one upstream: connection pool, TLS, redirects and time-outs.

It knows nothing about registries, and serves all threads of its upstream. It keeps no cookies and
no credentials, reads no ~/.netrc and no certificate bundle, and never retries. It asks for bodies
without compression, and honours the proxies of the environment. The client certificate is for the
upstream and its token realm: a host that a redirect leads to is connected to without one.

Tests: tests/fetch/oras/test_session.py, tests/fetch/oras/test_tls.py.
"""

from __future__ import annotations

import io
import logging
import os
import ssl
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import getproxies_environment

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import select_proxy
from urllib3.exceptions import InsecureRequestWarning

from ociproxy import __version__
from ociproxy.clock import time_left
from ociproxy.config.settings import Tls
from ociproxy.errors import UpstreamForbidden, UpstreamInvalid, UpstreamUntrusted
from ociproxy.fetch.oras.connect import Policy, policy_of, pool_classes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from requests.adapters import BaseAdapter
    from urllib3.poolmanager import PoolManager

    from ociproxy.config.settings import Upstream

    _Context = Callable[[], ssl.SSLContext]

# urllib3's warnings quote whole URLs, which may be signed. What matters of them is raised as well.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

_MAX_REDIRECTS: Final = 5
"""Registries redirect a blob once or twice; more redirects are a circle."""
_POOLS: Final = 16
"""Hosts that stay connected: the registry, its token realm, and the storage it redirects to."""
_DISCARD_LIMIT: Final = 64 * 1024
"""Bytes of an unwanted body read to keep its connection. Beyond, a new connection is cheaper."""
_NAME_LIMIT: Final = 80
"""Characters kept of a header that names something."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_Origin = tuple[str, str | None, int | None]


class Session(requests.Session):
    """A requests session with strict redirects and without requests' own credentials."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream
        self._certified: tuple[HTTPAdapter, set[_Origin]] | None = None
        self.max_redirects = _MAX_REDIRECTS
        self._proxied = bool(getproxies_environment().keys() - {"no"})
        # This keeps requests from ~/.netrc. `trust_env = False` would also turn off the proxies.
        self.auth = lambda request: request
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._headers = {
            "User-Agent": f"ociproxy/{__version__}",
            "Accept-Encoding": "identity",
            "Accept": "*/*",
        }
        self.headers = CaseInsensitiveDict(self._headers)

    def ask(self, method: str, url: str, headers: dict[str, str]) -> requests.Response:
        """The answer to a request without a body, redirects followed, its own body not read. `url`
        needs no quoting. `request` takes the processor for longer than all below it."""
        asked = requests.PreparedRequest()
        asked.method, asked.url = method, url
        asked.headers = CaseInsensitiveDict({**self._headers, **headers})
        settings = self.merge_environment_settings(url, {}, True, None, None)
        response = self.get_adapter(url).send(asked, **settings)
        if not response.is_redirect:
            return response
        # From here on as requests does it, with a request that has all that it copies.
        asked = self.prepare_request(requests.Request(method, url, headers=headers))
        followed: Iterator[requests.Response] = self.resolve_redirects(response, asked, **settings)
        *before, last = response, *followed
        last.history = before
        return last

    def certify(self, adapter: HTTPAdapter, urls: tuple[str, ...]) -> None:
        """Use `adapter`, which offers a client certificate, for the origins of `urls` alone."""
        self._certified = adapter, {origin(url) for url in urls}

    def certify_realm(self, url: str) -> None:
        """Offer the client certificate, if there is one, to this token realm of the upstream."""
        if self._certified is not None and len(self._certified[1]) < _POOLS:
            self._certified[1].add(origin(url))

    def get_adapter(self, url: str) -> BaseAdapter:
        """Called by requests for each request and each redirect."""
        if self._certified is not None and origin(url) in self._certified[1]:
            return self._certified[0]
        adapter: BaseAdapter = super().get_adapter(url)
        return adapter

    def close(self) -> None:
        if self._certified is not None:
            self._certified[0].close()
        super().close()

    def merge_environment_settings(
        self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any
    ) -> Any:
        """Called by requests for each request. The original takes a third of a request's time."""
        if self._proxied:
            return super().merge_environment_settings(url, proxies, stream, verify, cert)
        return {"proxies": proxies, "stream": stream, "verify": verify, "cert": cert}

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Called by requests, which follows any text. Raises UpstreamInvalid for what is no URL."""
        target: str | None = super().get_redirect_target(resp)
        if target is not None:
            upstream_url(target, self.upstream, what="redirect", base=resp.url)
        return target

    def rebuild_auth(
        self, prepared_request: requests.PreparedRequest, response: requests.Response
    ) -> None:
        """Called by requests for each redirect. The original reads ~/.netrc for the new host.
        Raises UpstreamForbidden for a redirect that must not be followed."""
        old, new = response.request.url or "", prepared_request.url or ""
        scheme = urlsplit(new).scheme
        if scheme not in _DEFAULT_PORTS:
            raise UpstreamForbidden(self.upstream, f"redirects to a URL of scheme {scheme!r}")
        if scheme == "http" and urlsplit(old).scheme == "https":
            raise UpstreamForbidden(self.upstream, "redirects from HTTPS to plain HTTP")
        if origin(old) != origin(new):
            prepared_request.headers.pop("Authorization", None)


class Adapter(HTTPAdapter):
    """TLS, addresses and time-outs as the upstream's entry says, whatever arguments `send` gets;
    the time-outs are shorter where the request has less time left."""

    def __init__(
        self, policy: Policy, context: _Context, timeout: tuple[float, float], size: int
    ) -> None:
        """`context` is called for each connection over TLS, and returns the same one."""
        self._policy = policy
        self._context = context
        self._timeout = timeout
        self._host_of = lru_cache(_POOLS)(self._find_host)
        super().__init__(pool_connections=_POOLS, pool_maxsize=size, max_retries=0)

    def init_poolmanager(self, *sizes: Any, **pool_kwargs: Any) -> None:
        super().init_poolmanager(*sizes, **pool_kwargs)
        self._police(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: object) -> PoolManager:
        proxy_kwargs = {"ssl_context": self._context(), **proxy_kwargs}
        if urlsplit(proxy).scheme == "https":
            # The upstream's CA and client certificate are not the proxy's business.
            proxy_kwargs["proxy_ssl_context"] = ssl.create_default_context()
        manager: PoolManager = super().proxy_manager_for(proxy, **proxy_kwargs)
        self._police(manager)
        return manager

    def _checked(self, proxy: str) -> str:
        """Its URL. Raises UpstreamInvalid for SOCKS: its library would choose the addresses."""
        url = proxy if "://" in proxy else f"http://{proxy}"  # as curl and containerd take it
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS:
            name = f"{parts.scheme}://{parts.hostname}"
            reason = f"the environment names the proxy {name}: only http:// and https:// are used"
            raise UpstreamInvalid(self._policy.upstream, reason)
        return url

    def _police(self, manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = pool_classes(self._policy)

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: object, cert: object = None
    ) -> tuple[Any, Any]:
        host, _ = super().build_connection_pool_key_attributes(request, True, None)
        # The second part would replace our context's verification by that of requests.
        return host, {}

    def _find_host(self, place: str) -> dict[str, Any]:
        asked = requests.PreparedRequest()
        asked.url = place
        return dict(self.build_connection_pool_key_attributes(asked, True)[0])

    def get_connection_with_tls_context(
        self, request: requests.PreparedRequest, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        """Called by requests. The original looks for a proxy where there is none."""
        if proxies:
            return super().get_connection_with_tls_context(request, verify, proxies, cert)
        host = self._host_of("/".join((request.url or "").split("/", 3)[:3]))
        secure = {"ssl_context": self._context()} if host["scheme"] == "https" else None
        return self.poolmanager.connection_from_host(**host, pool_kwargs=secure)

    def request_url(self, request: requests.PreparedRequest, proxies: Any) -> str:
        """Called by requests. The original parses the URL three times."""
        url = request.url or ""
        host, slash, path = url.partition("//")[2].partition("/")
        if proxies or not slash or "?" in host or "#" in url:
            return str(super().request_url(request, proxies))
        return f"/{path}"

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Called by requests. The original looks for cookies, and for the encoding of a text."""
        response = requests.Response()
        response.status_code, response.reason = resp.status, resp.reason
        response.headers = resp.headers  # of urllib3, whose names have no case either
        response.raw, response.request, response.url = resp, req, req.url or ""
        response.connection = self
        return response

    def cert_verify(self, conn: object, url: str, verify: object, cert: object) -> None:
        """Does nothing. The original adds certifi's bundle or REQUESTS_CA_BUNDLE to the context."""

    def send(  # type: ignore[override] # requests names all arguments but the first
        self, request: requests.PreparedRequest, *, stream: bool, proxies: Any, **_: object
    ) -> requests.Response:
        if proxies and (proxy := select_proxy(request.url or "", proxies)):
            proxies = {"all": self._checked(proxy)}
            self._policy.check_literal(urlsplit(request.url or "").hostname or "")
        timeout = (time_left(self._timeout[0]), time_left(self._timeout[1]))
        response = super().send(
            request, stream=stream, timeout=timeout, verify=True, proxies=proxies
        )
        if response.is_redirect:
            # requests reads a redirect's whole body before it follows, however large: give it none.
            discard(response)
            response.raw = urllib3.HTTPResponse(io.BytesIO(), preload_content=False)
        return response


def open_session(upstream: Upstream, *, connections: int) -> Session:
    """A session for this upstream, with at most `connections` idle connections to each host. Raises
    UpstreamUntrusted for certificate files that cannot be used."""
    timeouts = (upstream.timeouts.connect, upstream.timeouts.headers)
    policy = policy_of(upstream)
    session = Session(upstream.name)
    tls = upstream.tls
    if tls.cert is not None:
        context = _context_of(tls, upstream)
        session.certify(Adapter(policy, context, timeouts, connections), upstream.urls)
        tls = replace(tls, cert=None, key=None)
    adapter = Adapter(policy, _context_of(tls, upstream), timeouts, connections)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _context_of(tls: Tls, upstream: Upstream) -> _Context:
    """Made now, unless it is the system's and plain HTTP is spoken: a redirect may need it yet."""
    if tls == Tls() and not any(url.startswith("https:") for url in upstream.urls):
        return partial(tls_context, tls, upstream.name)
    context = tls_context(tls, upstream.name)
    return lambda: context


def tls_context(tls: Tls, upstream: str) -> ssl.SSLContext:
    """The trust store of OpenSSL (`SSL_CERT_FILE` honoured), or `ca` in its place, and the mirror's
    client certificate. Raises UpstreamUntrusted for files that cannot be used."""
    if tls == Tls():
        return _default_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as exc:  # ssl.SSLError is one
        files = ", ".join(str(path) for path in (tls.ca, tls.cert, tls.key) if path is not None)
        raise UpstreamUntrusted(upstream, f"cannot use {files}: {exc.strerror or exc}") from exc
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # The operator asked for it in the config file. A warning for each connection tells nothing.
        urllib3.disable_warnings(InsecureRequestWarning)
    return context


def upstream_url(text: str, upstream: str, *, what: str, base: str = "") -> SplitResult:
    """The parts of a URL that an upstream sent. Each is parsed here: urllib and requests raise
    ValueError for many. `base` is the URL that it is relative to. Raises UpstreamInvalid, which
    names `what` and not the URL: it may be signed."""
    try:
        parts = urlsplit(urljoin(base, text))
        if parts.netloc and not parts.hostname:
            raise ValueError("no host")
        _ = parts.port
    except ValueError as exc:
        raise UpstreamInvalid(upstream, f"sends a {what} that is no URL") from exc
    return parts


def origin(url: str) -> _Origin:
    """Scheme, host and port. Credentials for one origin are never sent to another."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def content_length(response: requests.Response) -> int | None:
    """The header's number of bytes; None where it is absent or no number."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def content_encoding(response: requests.Response) -> str:
    """What the header claims that the body is encoded with, right or wrong; empty for nothing."""
    said: str = response.headers.get("Content-Encoding", "").strip().lower()[:_NAME_LIMIT]
    return "" if said == "identity" else said


def read_bounded(response: requests.Response, limit: int) -> bytes:
    """At most `limit` bytes of the undecoded body. The connection is kept if the body ends there.
    Raises what the libraries raise; a TimeoutError kind too where the request's deadline passes."""
    data = bytearray()
    try:
        more = response.raw.read1
        while len(data) < limit and (piece := more(limit - len(data), decode_content=False)):
            data += piece
    finally:
        response.close()
    return bytes(data)


def discard(response: requests.Response) -> None:
    """Drop an answer, and keep its connection if the body is small and whole."""
    with suppress(urllib3.exceptions.HTTPError, OSError):
        read_bounded(response, _DISCARD_LIMIT)  # which closes it


@lru_cache(maxsize=4)
def _default_context(file: str | None, directory: str | None) -> ssl.SSLContext:
    """The operating system's trust store, which takes 25 ms to read. Environment variables name it:
    as arguments, so that a change is noticed."""
    return ssl.create_default_context()
