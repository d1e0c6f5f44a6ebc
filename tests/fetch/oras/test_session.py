"""Addresses, redirects, proxies and time, below anything a registry says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from ociproxy.config.settings import Auth, Secret, Tls
from ociproxy.errors import (
    BlobUnknown,
    OciProxyError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.backend import Quota
from ociproxy.fetch.oras.client import quota_in
from ociproxy.oci.reference import Reference
from tests.fetch.conftest import OpenBackend
from tests.fetch.contract import digest, read_all, reference, repository
from tests.fetch.peers import Proxy
from tests.fetch.tls import Authority
from tests.images import image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

# Redirects


def test_redirect_from_https_to_plain_http_is_refused(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    storage = make_upstream()
    upstream = make_upstream(tls=authority.server())
    blob = storage.add_content("team/app", random_blob(10))
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    with pytest.raises(UpstreamForbidden, match="plain HTTP"):
        open_backend(upstream, tls=Tls(ca=authority.ca)).open_blob(
            repository(upstream), digest(blob)
        )
    assert storage.count() == 0


def test_redirect_with_a_large_body(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    storage, upstream = make_upstream(), make_upstream()
    blob = storage.add_content("team/app", random_blob(10))
    upstream.add_content("team/app", blob)
    moved = Fault(
        status=307,
        body=bytes(3_000_000),
        headers={"Location": f"{storage.url}/v2/team/app/blobs/{blob.digest}"},
        stall_after=1_000_000,
    )
    upstream.fault("/blobs/", moved)
    backend = open_backend(upstream, scheme="http")
    assert read_all(backend.open_blob(repository(upstream), digest(blob))) == blob.data


@pytest.mark.parametrize("query", ["", "?sig=a/secret", "?sig=a#b/c"])
def test_redirect_to_a_url_without_a_path(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, query: str
) -> None:
    storage, upstream = make_upstream(), make_upstream()
    blob = upstream.add_content("team/app", random_blob(10))
    moved = Fault(status=307, body=b"", headers={"Location": f"{storage.url}{query}"})
    upstream.fault("/blobs/", moved)
    with pytest.raises(BlobUnknown):
        open_backend(upstream, scheme="http").open_blob(repository(upstream), digest(blob))
    (asked,) = storage.seen()
    assert (asked.path, asked.query) == ("/", query.partition("#")[0].removeprefix("?"))


# Proxies


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    made: list[Proxy] = []

    def make(target: str) -> Proxy:
        made.append(Proxy(target))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("written", ["http://", ""])
def test_proxy_of_the_environment(
    written: str,
    make_upstream: Callable[..., FakeUpstream],
    make_proxy: Callable[[str], Proxy],
    open_backend: OpenBackend,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Unlisted, and on names only the proxy knows: its own address, a loopback one, is not judged.
    plain = make_upstream()
    secure = make_upstream(tls=authority.server("registry.invalid"))
    proxies = {"http": make_proxy(plain.registry), "https": make_proxy(secure.registry)}
    for scheme, upstream in (("http", plain), ("https", secure)):
        address = proxies[scheme].url.removeprefix("http://")
        monkeypatch.setenv(f"{scheme}_proxy", f"{written}{address}")
        top = upstream.add("team/app", image(), tag="v1").top
        backend = open_backend(
            "registry.invalid", scheme=scheme, tls=Tls(ca=authority.ca), listed=False
        )
        holder = backend.fetch_manifest(Reference.parse("registry.invalid/team/app:v1"))
        assert holder.raw == top.data
    assert proxies["http"].lines == [
        "GET http://registry.invalid/v2/team/app/manifests/v1 HTTP/1.1"
    ]
    (line,) = proxies["https"].lines
    assert line.startswith("CONNECT registry.invalid:443 ")


def test_certificate_behind_a_proxy_is_verified_all_the_same(
    make_upstream: Callable[..., FakeUpstream],
    make_proxy: Callable[[str], Proxy],
    open_backend: OpenBackend,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = make_upstream(tls=authority.server("registry.invalid"))
    monkeypatch.setenv("https_proxy", make_proxy(upstream.registry).url)
    with pytest.raises(UpstreamUntrusted):
        open_backend("registry.invalid").fetch_manifest(
            Reference.parse("registry.invalid/team/app:v1")
        )


def test_no_proxy_is_honoured(
    upstream: FakeUpstream, open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    upstream.add("team/app", image(), tag="v1")
    open_backend(upstream, scheme="http").fetch_manifest(reference(upstream))
    monkeypatch.delenv("no_proxy")
    with pytest.raises(UpstreamUnavailable) as caught:
        open_backend(upstream, scheme="http").fetch_manifest(reference(upstream))
    assert caught.value.unreachable


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_gets_its_credentials_and_the_upstream_does_not(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    tls = authority.server("registry.invalid") if scheme == "https" else None
    upstream = make_upstream(tls=tls)
    top = upstream.add("team/app", image(), tag="v1").top
    where = Reference.parse("registry.invalid/team/app:v1")
    with contextlib.closing(Proxy(upstream.registry, credentials="ann:p@ss")) as proxy:
        for secret in ("ann:p%40ss@", "ann:wrong@", ""):
            written = "" if scheme == "https" else "http://"
            address = proxy.url.removeprefix("http://")
            monkeypatch.setenv(f"{scheme}_proxy", f"{written}{secret}{address}")
            backend = open_backend("registry.invalid", scheme=scheme, tls=Tls(ca=authority.ca))
            if secret == "ann:p%40ss@":
                assert backend.fetch_manifest(where).raw == top.data
                continue
            with pytest.raises(OciProxyError) as caught:
                backend.fetch_manifest(where)
            assert "407" in str(caught.value)
    for request in upstream.requests:
        if scheme == "https":
            assert "Proxy-Authorization" not in request.headers


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.0/8", "10.0.0.1, 127.0.0.1"])
def test_no_proxy_takes_addresses_and_networks(
    upstream: FakeUpstream, open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", entry)
    upstream.add("team/app", image(), tag="v1")
    open_backend(upstream, scheme="http").fetch_manifest(reference(upstream))


def test_a_dead_proxy_is_blamed_by_name(
    open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://user:hunter2@127.0.0.1:9")
        with pytest.raises(UpstreamUnavailable) as caught:
            open_backend("registry.invalid", scheme=scheme).fetch_manifest(
                Reference.parse("registry.invalid/team/app:v1")
            )
        assert caught.value.reason == "the proxy http://127.0.0.1:9: connection refused"
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    with pytest.raises(UpstreamUnavailable, match=r"proxy.invalid:3128: name does not resolve"):
        open_backend("registry.invalid").fetch_manifest(
            Reference.parse("registry.invalid/team/app:v1")
        )


def test_a_socks_proxy_is_refused_in_words(
    open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("all_proxy", "socks5://user:hunter2@127.0.0.1:9")
    with pytest.raises(UpstreamInvalid) as caught:
        open_backend("registry.invalid").fetch_manifest(
            Reference.parse("registry.invalid/team/app:v1")
        )
    assert "the proxy socks5://127.0.0.1: only http:// and https:// are used" in str(caught.value)


def test_password_does_not_show_in_an_error(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.stop_listening()
    auth = Auth(user="alice", password=Secret("hunter2"))
    with pytest.raises(UpstreamUnavailable) as caught:
        open_backend(upstream, scheme="http", auth=auth).fetch_manifest(reference(upstream))
    assert "hunter2" not in repr(caught.value)


# Headers


@pytest.mark.parametrize(
    ("limit", "remaining", "expected"),
    [
        ("100;w=21600", "76;w=21600", Quota(100, 76, 21600)),
        ("100", "9", Quota(100, 9)),
        ("100, 100;w=60", "9;w=60", Quota(100, 9, 60)),
        (" 200 ; w = 60 ", "0", Quota(200, 0, 60)),
        ("many", "9", None),
        ("100", "-1", None),
        ("", "", None),
        ("9" * 4000, "1", None),
    ],
)
def test_quota_headers(limit: str, remaining: str, expected: Quota | None) -> None:
    given = {"ratelimit-limit": limit, "ratelimit-remaining": remaining}
    assert quota_in(given) == expected


def test_quota_is_low_below_a_tenth() -> None:
    assert [Quota(100, left).is_low for left in (0, 9, 10, 100)] == [True, True, False, False]
