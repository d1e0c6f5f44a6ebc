"""TLS, addresses, redirects, proxies and time, below anything a registry says."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.config import Auth, Fetch, Secret, Timeouts, Tls, Upstream
from ociproxy.errors import UpstreamForbidden, UpstreamUnavailable, UpstreamUntrusted
from ociproxy.fetch.oras.backend import OrasBackend
from ociproxy.fetch.oras.connect import Policy
from ociproxy.fetch.oras.transport import open_session, tls_context
from ociproxy.reference import Reference
from tests.fetch.contract import digest, read_all, reference, repository
from tests.fetch.tls import Authority
from tests.images import image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

TIMEOUTS = Timeouts(connect=2.0, headers=2.0, stall=2.0)
NOBODY = "192.0.2.1"  # TEST-NET-1

OpenBackend = Callable[..., OrasBackend]


@pytest.fixture
def open_backend() -> Iterator[OpenBackend]:
    opened: list[OrasBackend] = []

    def make(upstream: FakeUpstream | str, **changes: object) -> OrasBackend:
        name = upstream if isinstance(upstream, str) else upstream.registry
        entry = Upstream(name=name, scheme="https", timeouts=TIMEOUTS)
        opened.append(OrasBackend(replace(entry, **changes), Fetch()))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for each in opened:
        each.close()


# TLS


@pytest.fixture(params=["system", "given", "unverified"])
def trust(
    request: pytest.FixtureRequest, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Tls:
    """The three ways to look at a server's certificate."""
    if request.param == "system":
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        return Tls()
    return Tls(ca=authority.ca) if request.param == "given" else Tls(insecure_skip_verify=True)


def test_one_way_tls(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    trust: Tls,
) -> None:
    upstream = make_upstream(tls=authority.server())
    top = upstream.add("team/app", image(), tag="v1").top
    blob = upstream.add_content("team/app", random_blob(300_000))
    backend = open_backend(upstream, tls=trust)
    assert backend.fetch_manifest(reference(upstream)).raw == top.data
    assert read_all(backend.open_blob(repository(upstream), digest(blob), start=7)) == blob.data[7:]


def test_abort_under_tls(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(stall_after=100_000))
    backend = open_backend(upstream, tls=Tls(ca=authority.ca), timeouts=replace(TIMEOUTS, stall=30))
    stream = backend.open_blob(repository(upstream), digest(blob))
    timer = threading.Timer(0.2, stream.abort)
    timer.start()
    started = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="aborted"):
        read_all(stream)
    timer.join()
    assert time.monotonic() - started < 2


def test_mutual_tls(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    trust: Tls,
) -> None:
    upstream = make_upstream(tls=authority.server(clients=other_authority))
    top = upstream.add("team/app", image(), tag="v1").top
    cert, key = other_authority.client()
    backend = open_backend(upstream, tls=replace(trust, cert=cert, key=key))
    assert backend.fetch_manifest(reference(upstream)).raw == top.data
    stranger, its_key = authority.client("stranger")
    for refused in (trust, replace(trust, cert=stranger, key=its_key)):
        with pytest.raises((UpstreamUntrusted, UpstreamUnavailable)):
            open_backend(upstream, tls=refused).fetch_manifest(reference(upstream))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_missing_client_certificate_is_said(
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    version: ssl.TLSVersion,
) -> None:
    context = authority.server(clients=other_authority)
    context.minimum_version = context.maximum_version = version

    def handshake(client: socket.socket) -> None:
        secure = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        with contextlib.suppress(ssl.SSLError):
            secure.do_handshake()
        # Closing with unread bytes resets the connection, and a reset can overtake the alert.
        with socket.socket(fileno=secure.detach()) as bare:
            bare.shutdown(socket.SHUT_WR)
            while bare.recv(4096):
                pass

    with raw_server(handshake) as name:
        backend = open_backend(name, tls=Tls(ca=authority.ca))
        with pytest.raises(UpstreamUntrusted, match="client certificate"):
            backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))


def test_unknown_authority(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = make_upstream(tls=authority.server())
    # What requests would look into, and we do not.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(authority.ca))
    for tls in (Tls(), Tls(ca=other_authority.ca)):
        with pytest.raises(UpstreamUntrusted, match="certificate verify failed"):
            open_backend(upstream, tls=tls).fetch_manifest(reference(upstream))
    # A given authority replaces the system's.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    with pytest.raises(UpstreamUntrusted):
        open_backend(upstream, tls=Tls(ca=other_authority.ca)).resolve(reference(upstream))
    assert upstream.count() == 0


def test_no_other_certificate_is_trusted_after_a_request(
    make_upstream: Callable[..., FakeUpstream],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    upstream = make_upstream(tls=authority.server())
    session = open_session(Upstream(name=upstream.registry), connections=1)
    assert session.get(f"{upstream.url}/v2/").status_code == 200
    context = session.get_adapter(upstream.url)._context  # type: ignore[attr-defined]
    assert len(context.get_ca_certs()) == 1
    session.close()


def test_certificate_of_another_name(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server("registry.example"))
    with pytest.raises(UpstreamUntrusted, match="certificate verify failed: IP address mismatch"):
        open_backend(upstream, tls=Tls(ca=authority.ca)).fetch_manifest(reference(upstream))


def test_plain_http_where_tls_is_configured(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    with pytest.raises(UpstreamUnavailable, match="TLS failed: wrong version number") as caught:
        open_backend(upstream).fetch_manifest(reference(upstream))
    assert caught.value.unreachable


def test_certificate_files_that_are_none(tmp_path: Path, authority: Authority) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    cert, _ = authority.client("a")
    _, other_key = authority.client("b")
    for tls in (
        Tls(ca=nonsense),
        Tls(ca=tmp_path / "missing.pem"),
        Tls(cert=nonsense, key=nonsense),
        Tls(cert=cert, key=other_key),
    ):
        with pytest.raises(UpstreamUntrusted, match=re.escape(str(tls.ca or tls.cert))):
            tls_context(tls, "registry.example")


# Scheme


def test_auto_finds_https(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto", tls=Tls(ca=authority.ca))
    backend.fetch_manifest(reference(upstream))
    upstream.stop_listening()
    with pytest.raises(UpstreamUnavailable):
        backend.fetch_manifest(reference(upstream))


def test_auto_does_not_fall_back_from_a_bad_certificate(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    with pytest.raises(UpstreamUntrusted):
        open_backend(upstream, scheme="auto").fetch_manifest(reference(upstream))


def test_auto_does_not_fall_back_from_a_late_answer(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    upstream.fault("", Fault(delay=20))
    timeouts = replace(TIMEOUTS, headers=0.3)
    backend = open_backend(upstream, scheme="auto", tls=Tls(ca=authority.ca), timeouts=timeouts)
    with pytest.raises(UpstreamUnavailable, match="waiting for headers"):
        backend.fetch_manifest(reference(upstream))
    assert upstream.count() == 1


def test_auto_finds_plain_http_once(upstream: FakeUpstream, open_backend: OpenBackend) -> None:
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto")
    for _ in range(2):
        backend.fetch_manifest(reference(upstream))
    assert [request.path for request in upstream.requests].count("/v2/") == 1


def test_auto_looks_again_where_nothing_answered(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto")
    upstream.stop_listening()
    with pytest.raises(UpstreamUnavailable, match="connection refused"):
        backend.fetch_manifest(reference(upstream))
    upstream.listen_again()
    backend.fetch_manifest(reference(upstream))


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
        ("169.254.169.254", False, False),
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


class Proxy:
    """An HTTP proxy that connects everything to one address, and keeps the request lines."""

    def __init__(self, target: str) -> None:
        host, _, port = target.partition(":")
        self._target = (host, int(port))
        self.lines: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                target = socket.create_connection(self._target)
                self._sockets += [client, target]
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(65536)
                self.lines.append(head.partition(b"\r\n")[0].decode())
                if head.startswith(b"CONNECT"):
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    target.sendall(re.sub(rb" http://[^/ ]+", b" ", head, count=1))
                for pair in ((client, target), (target, client)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


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


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server below HTTP: `answer` gets each connection. Gives host:port."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    answer(client)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)


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
