"""Where connections go, and how the bytes of an answer arrive, over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from ociproxy.config.settings import Tls
from ociproxy.errors import UpstreamForbidden, UpstreamUnavailable
from ociproxy.fetch.oras import connect
from ociproxy.fetch.oras.client import HttpBlobStream
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, Repository
from tests.fetch.conftest import TIMEOUTS, OpenBackend
from tests.fetch.contract import digest, reference, repository
from tests.fetch.peers import Proxy, raw_server
from tests.fetch.tls import Authority
from tests.images import image, random_blob, random_bytes
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

# Addresses


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
        with pytest.raises(
            UpstreamForbidden,
            match="a loopback address, where only a registry with",
        ):
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


# Headers


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


@pytest.mark.parametrize(
    "block",
    [
        b"Content-Type: application/json\r\nContent-Length: 5\r\n\r\n",
        b"a:b\r\nA: \t b  \r\nEmpty:\r\n\r\n",
        b'Www-Authenticate: Bearer realm="https://auth/token",scope="a:b"\r\n\r\n',
        b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\n",
        b"Long: " + b"y" * 20_000 + b"\r\nB: 1\r\n\r\n",
        b"Folded: a\r\n b\r\nC: d\r\n\r\n",
        b"Name : a\r\n\r\n",
        b"no colon\r\nA: b\r\n\r\n",
        b"A: b\nC: d\n\n",
        b"A: b\rC: d\r\n\r\n",
        b"A: caf\xe9\r\n\r\n",
        b"A: \x00\r\n\r\n",
        b"A: cut",
        b"\r\nA: body\r\n\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("piece", [8192, 7])
def test_headers_are_what_http_client_reads(block: bytes, piece: int) -> None:
    file = io.BufferedReader(io.BytesIO(block + b"{}"), piece)
    found = connect._parse_headers(file)
    plain = io.BytesIO(block + b"{}")
    expected = http.client.parse_headers(plain)
    assert found.items() == expected.items()
    assert found.get_all("A") == expected.get_all("A")
    assert [found.get(name) for name in ("a", "LONG", "none")] == [
        expected.get(name) for name in ("a", "LONG", "none")
    ]
    assert "content-LENGTH" in found or "content-LENGTH" not in expected
    assert file.read() == plain.read()


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


# Bodies

MIB = 1024 * 1024
PIECE = 256 * 1024
RECORD = 16 * 1024
"""Bytes that TLS hands out at a time."""


class Peer:
    """A server of one body: `head` at once, then the rest in steps that the test allows."""

    def __init__(self, head: str, *steps: bytes) -> None:
        self._head = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode()
        self._steps = steps
        self._allowed = threading.Semaphore(0)
        self.context: ssl.SSLContext | None = None
        self.last: Callable[[socket.socket], object] = lambda client: None
        """Called when all is sent; then the connection is closed."""

    def allow(self) -> None:
        """Let the next step be sent."""
        self._allowed.release()

    def __call__(self, client: socket.socket) -> None:
        if self.context is not None:
            client = self.context.wrap_socket(client, server_side=True)
        with client:
            client.recv(65536)
            client.sendall(self._head)
            for step in self._steps:
                assert self._allowed.acquire(timeout=20)
                client.sendall(step)
            self.last(client)


OpenStream = Callable[..., HttpBlobStream]


@pytest.fixture(params=["http", "https", "https through a proxy"])
def open_stream(
    request: pytest.FixtureRequest,
    open_backend: OpenBackend,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[OpenStream]:
    """Opens a blob of a `Peer`, whose first step is sent once the headers are there."""
    scheme, _, proxied = request.param.partition(" ")
    with contextlib.ExitStack() as stack:

        def start(peer: Peer, stall: float = 30.0) -> HttpBlobStream:
            peer.context = authority.server() if scheme == "https" else None
            name = stack.enter_context(raw_server(peer))
            if proxied:
                proxy = stack.enter_context(contextlib.closing(Proxy(name)))
                monkeypatch.setenv("https_proxy", proxy.url)
            backend = open_backend(
                name,
                scheme=scheme,
                tls=Tls(ca=authority.ca) if scheme == "https" else Tls(),
                timeouts=replace(TIMEOUTS, stall=stall),
            )
            stream = backend.open_blob(Repository.parse(name, "a/b"), Digest.of(b"any"))
            stack.callback(backend.close)
            stack.callback(stream.close)
            peer.allow()
            return stream

        yield start


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read gathers for longer than a busy machine keeps the peer from sending."""
    monkeypatch.setattr(connect, "_GATHER", 5.0)


def until_closed(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.recv(1)


def read_on(stream: HttpBlobStream) -> Iterator[bytes]:
    while piece := stream.read(MIB):
        yield piece


@pytest.mark.usefixtures("patient")
def test_a_body_arrives_in_large_pieces(open_stream: OpenStream) -> None:
    body = random_bytes(4 * MIB)
    found = list(read_on(open_stream(Peer(f"Content-Length: {len(body)}", body))))
    assert b"".join(found) == body
    _first, *others, _last = found
    assert others
    assert all(len(piece) >= PIECE for piece in others)
    assert len(others) <= len(body) // PIECE


@pytest.mark.usefixtures("patient")
def test_the_first_read_returns_at_once_and_the_second_gathers(open_stream: OpenStream) -> None:
    peer = Peer("Content-Length: 30000", b"a", b"b", b"c" * 29_998)
    stream = open_stream(peer)
    started = time.monotonic()
    assert stream.read(MIB) == b"a"
    assert time.monotonic() - started < 3
    peer.allow()
    timer = threading.Timer(0.3, peer.allow)
    timer.start()
    assert stream.read(MIB) == b"b" + b"c" * 29_998
    assert stream.read(MIB) == b""
    timer.join()


@pytest.mark.usefixtures("patient")
def test_the_size_of_a_chunk_is_not_waited_for(open_stream: OpenStream) -> None:
    steps = (b"10\r\n" + b"a" * 16 + b"\r\n", b"10\r\n" + b"b" * 16 + b"\r\n", b"0\r\n\r\n")
    peer = Peer("Transfer-Encoding: chunked", *steps)
    peer.last = until_closed
    stream = open_stream(peer)
    started = time.monotonic()
    assert stream.read(MIB) == b"a" * 16
    peer.allow()
    assert stream.read(MIB) == b"b" * 16
    peer.allow()
    assert stream.read(MIB) == b""
    assert time.monotonic() - started < 3


def test_a_trickle_is_handed_on_as_it_comes(open_stream: OpenStream) -> None:
    def trickle(client: socket.socket) -> None:
        for _ in range(20):
            client.sendall(b"x")
            time.sleep(0.05)

    peer = Peer("Content-Length: 100000", b"x")
    peer.last = trickle
    found: list[bytes] = []
    with pytest.raises(UpstreamUnavailable, match="closed"):
        found.extend(read_on(open_stream(peer)))
    assert sum(map(len, found)) == 21
    assert len(found) > 10


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def garbage_below_tls(client: socket.socket) -> None:
    with socket.socket(fileno=client.detach()) as bare:
        bare.sendall(b"not a record of TLS" * 100)
        bare.shutdown(socket.SHUT_WR)
        until_closed(bare)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("open_stream", "failure", "reason"),
    [
        ("http", reset, "reset by peer"),
        ("https", garbage_below_tls, "wrong version number"),
        ("https through a proxy", garbage_below_tls, "wrong version number"),
    ],
    indirect=["open_stream"],
)
def test_an_error_does_not_take_along_the_bytes_before_it(
    open_stream: OpenStream, failure: Callable[[socket.socket], None], reason: str
) -> None:
    def fail(client: socket.socket) -> None:
        time.sleep(0.5)  # the reader has these bytes, and gathers
        failure(client)

    peer = Peer("Content-Length: 100000", b"a" * 10, b"b" * 1000)
    peer.last = fail
    stream = open_stream(peer)
    assert stream.read(MIB) == b"a" * 10
    peer.allow()
    assert stream.read(MIB) == b"b" * 1000
    with pytest.raises(UpstreamUnavailable, match=reason):
        list(read_on(stream))


def test_a_stall_is_one_after_a_read_that_gathered(open_stream: OpenStream) -> None:
    peer = Peer("Content-Length: 100000", b"a", b"b", b"c")
    peer.last = until_closed
    stream = open_stream(peer, stall=1.0)
    assert stream.read(MIB) == b"a"
    peer.allow()
    assert stream.read(MIB) == b"b"
    timer = threading.Timer(0.4, peer.allow)  # longer than a read gathers, and no stall
    timer.start()
    assert stream.read(MIB) == b"c"
    started = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="timed out after 1 s without data") as caught:
        stream.read(MIB)
    assert caught.value.timed_out
    assert time.monotonic() - started > 0.8
    timer.join()


@pytest.mark.usefixtures("patient")
def test_abort_ends_a_read_that_gathers(open_stream: OpenStream) -> None:
    peer = Peer("Content-Length: 100000", b"a", b"b")
    peer.last = until_closed
    stream = open_stream(peer)
    assert stream.read(MIB) == b"a"
    peer.allow()
    timer = threading.Timer(0.3, stream.abort)
    timer.start()
    started = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="aborted"):
        stream.read(MIB)
    assert time.monotonic() - started < 3
    timer.join()
