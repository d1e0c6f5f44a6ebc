"""Addresses, redirects, proxies and time, below anything a registry says."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from ociproxy.config.settings import Auth, Secret, Tls
from ociproxy.errors import UpstreamForbidden, UpstreamUnavailable, UpstreamUntrusted
from ociproxy.fetch.oras.connect import Policy
from ociproxy.oci.reference import Reference
from tests.fetch.conftest import TIMEOUTS, OpenBackend
from tests.fetch.contract import digest, read_all, reference, repository
from tests.fetch.peers import Proxy, raw_server
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


# Addresses


@pytest.mark.parametrize(
    ("address", "unlisted", "listed"),
    [
        ("127.0.0.1", False, True),
        ("127.8.9.10", False, True),
        ("::1", False, True),
        ("::ffff:127.0.0.1", False, True),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("224.0.0.1", False, True),
        ("ff02::1", False, True),
        ("0.1.2.3", False, True),
        ("255.255.255.255", False, True),
        ("169.254.169.254", False, False),
        ("64:ff9b::127.0.0.1", False, True),
        ("64:ff9b::169.254.169.254", False, False),
        ("64:ff9b:1::169.254.169.254", False, False),
        ("64:ff9b::1.1.1.1", True, True),
        ("2002:7f00:1::", False, True),
        ("2002:a9fe:a9fe::1", False, False),
        ("2002:101:101::1", True, True),
        ("::127.0.0.1", False, True),
        ("::ffff:0:127.0.0.1", False, True),
        ("2001:0:7f00:1::", False, True),
        ("100.100.100.200", False, False),
        ("fd00:ec2::254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1", False, False),
        ("fe80::1%eth0", False, False),
        ("10.0.0.1", True, True),
        ("192.168.1.1", True, True),
        ("fd00::1", True, True),
        ("1.1.1.1", True, True),
    ],
)
def test_which_addresses_are_refused(address: str, unlisted: bool, listed: bool) -> None:
    assert (Policy("r", False, 1.0).refusal(address) is None) is unlisted
    assert (Policy("r", True, 1.0).refusal(address) is None) is listed


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("172.32.0.1", False),
        ("192.168.255.255", True),
        ("100.64.0.1", True),
        ("100.128.0.1", False),
        ("fd12:3456::1", True),
        ("::ffff:10.0.0.1", True),
        ("64:ff9b::10.0.0.1", True),
        ("2002:a00:1::1", True),
        ("1.1.1.1", False),
        ("2606:4700::1111", False),
    ],
)
def test_private_addresses_are_refused_where_the_operator_says_so(
    address: str, private: bool
) -> None:
    assert (Policy("r", False, 1.0, deny_private=True).refusal(address) is not None) is private
    assert Policy("r", False, 1.0).refusal(address) is None
    assert Policy("r", True, 1.0, deny_private=True).refusal(address) is None


@pytest.mark.parametrize(
    "host",
    ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "[::1]", "localhost", "a.localhost"],
)
def test_behind_a_proxy_a_host_written_as_an_address_is_judged(
    upstream: FakeUpstream, open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    proxy = Proxy(upstream.registry)
    monkeypatch.setenv("http_proxy", proxy.url)
    try:
        backend = open_backend(f"{host}:5000", scheme="http", listed=False)
        with pytest.raises(UpstreamForbidden, match="a loopback address"):
            backend.fetch_manifest(Reference.parse(f"{host}:5000/team/app:v1"))
        assert proxy.lines == []
    finally:
        proxy.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:7f00:1]"])
def test_unlisted_upstream_on_this_host_is_never_connected_to(
    upstream: FakeUpstream, open_backend: OpenBackend, host: str
) -> None:
    name = f"{host}:{upstream.registry.partition(':')[2]}"
    backend = open_backend(name, scheme="http", listed=False)
    with pytest.raises(UpstreamForbidden):
        backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))
    assert upstream.count() == 0


def test_listed_upstream_may_not_lead_to_a_link_local_address(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = random_blob(10)
    upstream.fault("/blobs/", Fault(redirect="http://169.254.169.254/latest/meta-data"))
    backend = open_backend(upstream, scheme="http")
    with pytest.raises(UpstreamForbidden, match="link-local"):
        backend.open_blob(repository(upstream), digest(blob))
    upstream.protect("team/two", TokenAuth(realm="http://[fe80::1]/token"))
    with pytest.raises(UpstreamForbidden, match="link-local"):
        backend.fetch_manifest(reference(upstream, "team/two:v1"))


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


def test_proxy_of_the_environment(
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
        monkeypatch.setenv(f"{scheme}_proxy", proxies[scheme].url)
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


# Time


def drip(client: socket.socket) -> None:
    client.recv(65536)
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60:
        client.sendall(bytes([byte]))
        time.sleep(0.1)


def test_headers_that_come_byte_by_byte_are_late_all_the_same(open_backend: OpenBackend) -> None:
    with raw_server(drip) as name:
        backend = open_backend(name, scheme="http", timeouts=replace(TIMEOUTS, headers=0.5))
        started = time.monotonic()
        with pytest.raises(UpstreamUnavailable, match="waiting for headers") as caught:
            backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))
        assert caught.value.timed_out
        assert time.monotonic() - started < 2
        backend.close()


def garbage(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def many_headers(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n")


def long_header(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n")


def two_lengths(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n{}")


@pytest.mark.parametrize("answer", [garbage, many_headers, long_header, two_lengths])
def test_answers_that_are_no_http(
    open_backend: OpenBackend, answer: Callable[[socket.socket], None]
) -> None:
    with raw_server(answer) as name:
        with pytest.raises(UpstreamUnavailable) as caught:
            open_backend(name, scheme="http").fetch_manifest(Reference.parse(f"{name}/a/b:v1"))
        assert len(str(caught.value)) < 200


def test_address_that_swallows_packets(open_backend: OpenBackend) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    name = f"127.0.0.1:{listener.getsockname()[1]}"
    # A full backlog: the kernel drops further handshakes.
    waiting = [socket.socket() for _ in range(4)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
    time.sleep(0.1)
    backend = open_backend(name, scheme="http", timeouts=replace(TIMEOUTS, connect=0.3))
    with pytest.raises(UpstreamUnavailable, match=r"timed out after 0\.3 s connecting") as caught:
        backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))
    assert (caught.value.timed_out, caught.value.unreachable) == (True, True)
    for each in (*waiting, listener):
        each.close()


def test_second_address_is_tried(
    upstream: FakeUpstream, open_backend: OpenBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(upstream.registry.partition(":")[2])
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
        for address in ("127.0.0.3", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", _resolver(found))
    upstream.add("team/app", image(), tag="v1")
    name = f"registry.invalid:{port}"
    backend = open_backend(name, scheme="http")
    assert backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))  # type: ignore[truthy-bool]


def _resolver(found: object) -> Callable[..., object]:
    original = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> object:
        if host == "registry.invalid":
            return found
        return original(host, *arguments, **options)  # type: ignore[arg-type]

    return resolve


def test_password_does_not_show_in_an_error(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.stop_listening()
    auth = Auth(user="alice", password=Secret("hunter2"))
    with pytest.raises(UpstreamUnavailable) as caught:
        open_backend(upstream, scheme="http", auth=auth).fetch_manifest(reference(upstream))
    assert "hunter2" not in repr(caught.value)
