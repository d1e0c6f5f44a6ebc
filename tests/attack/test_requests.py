"""Requests that are meant to hold a connection, or the server, for as long as it takes."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Callable

from tests.attack.conftest import assert_quiet, refusal
from tests.images import image, random_blob
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]


def spoken(server: Mirror, sent: bytes) -> bytes:
    """What comes back, and then the end of the connection."""
    received = b""
    with socket.create_connection((server.host, server.port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        # It may hang up before it has taken everything.
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                received += data
    return received


def test_absurd_lengths_are_refused_at_once(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    name = upstream.registry
    # 10,000 segments and a megabyte are more than a request line may have: 16 KiB.
    for target in (
        "/v2/" + "a/" * 10_000 + f"manifests/v1?ns={name}",
        f"/v2/app/manifests/{'a' * 2**20}?ns={name}",
        f"/v2/app/manifests/v1?ns={name}&x={'a' * 2**20}",
    ):
        assert server.get(target).status in (400, 414, 431)
    # Within the line's limit they are refused for what they are.
    for target, refused in (
        ("/v2/" + "a/" * 7000 + f"manifests/v1?ns={name}", (400, "NAME_INVALID")),
        (f"/v2/app/manifests/{'a' * 15_000}?ns={name}", (404, "MANIFEST_UNKNOWN")),
        (f"/v2/app/blobs/sha256:{'a' * 15_000}?ns={name}", (400, "DIGEST_INVALID")),
        (f"/v2/app/manifests/v1?ns={'a.' * 7000}", (400, "NAME_INVALID")),
    ):
        answer = server.get(target)
        assert refusal(answer) == refused
        assert len(answer.body) < 1000
    assert upstream.requests == []
    assert server.get("/healthz").status == 200
    assert_quiet(server)


def test_slow_headers_do_not_keep_a_connection(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    app = upstream.add("app", image("app"), tag="v1")
    config = {"upstreams": [upstream_entry(upstream.url)], "serve": {"head_timeout": "2s"}}
    server = mirror(config)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection((server.host, server.port), timeout=10))
            for _ in range(200)
        ]
        for client in slow:
            client.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n")
        for _ in range(5):
            time.sleep(0.2)
            for client in slow:
                client.sendall(b"X: y\r\n")
        # While they trickle, other clients are served.
        assert server.manifest(upstream.registry, "app", "v1").body == app.top.data
        for client in slow:
            with contextlib.suppress(ConnectionError):
                while client.recv(65536):
                    pass
    assert time.monotonic() - began < 8
    assert_quiet(server)


def test_a_client_that_holds_all_connections_keeps_no_other_out(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("app", random_blob(1 << 20))
    upstream.fault("/blobs/", Fault(stall_after=1 << 19))
    config = {"upstreams": [upstream_entry(upstream.url)], "serve": {"connections": 8}}
    server = mirror(config, admin=True)
    # Idle ones; then ones that are in use for as long as their client likes.
    for path in ("/v2/", f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}"):
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                held = socket.create_connection((server.host, server.port), timeout=10)
                stack.enter_context(held)
                held.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert held.recv(100).startswith(b"HTTP/1.1 200 ")
            for number in range(2, 5):
                client = http.client.HTTPConnection(
                    server.host, server.port, timeout=10, source_address=(f"127.0.0.{number}", 0)
                )
                stack.callback(client.close)
                client.request("GET", "/v2/")
                response = client.getresponse()
                response.read()
                assert response.status == 200
        server.wait_for(
            lambda: server.metrics()["ociproxy_connections"] == 0, "the connections ended"
        )
    upstream.release()
    assert_quiet(server)


def test_a_request_body_is_not_taken(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    idle = server.peak_rss()
    for length in (b"Content-Length: 100000000", b"Transfer-Encoding: chunked"):
        head = b"POST /v2/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += length + b"\r\n\r\n"
        body = b"5f5e100\r\n" if b"chunked" in head else b""
        answer = spoken(server, head + body + b"x" * 100_000_000)
        assert answer == b"" or answer.split(b" ")[1] in (b"405", b"413")
    assert server.peak_rss() - idle < 32 * 1024 * 1024
    assert server.get("/healthz").status == 200
    assert_quiet(server)


def test_a_compressed_request_body_is_not_unpacked(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    head = b"POST /v2/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
    head += b"Connection: close\r\nContent-Length: 5\r\n\r\n"
    answer = spoken(server, head + b"bogus")
    assert answer.split(b" ")[1] in (b"400", b"405", b"413")
    assert_quiet(server)
