"""Requests that two parsers could read differently: one answer, then the connection ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.wire import Wire, statuses
from tests.server import Mirror

HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: hidden\r\n\r\n"
POST = b"POST /v2/ HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    started = Mirror(tmp_path_factory.mktemp("mirror"))
    started.start()
    try:
        yield started
        started.stop()
    finally:
        started.kill()


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 0\r\nContent-Length: 40\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 40\r\nContent-Length: 40\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 0, 40\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: +4\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: -1\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 0x4\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + HIDDEN,
        POST + b"Content-Length : 4\r\n\r\n" + HIDDEN,
        POST + b"Content-Length\r\n: 4\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\n\r\n0_0\r\n\r\n" + HIDDEN,
        GET.replace(b"\r\n", b"\n") + b"\n" + HIDDEN,
        GET + b"A: b\nContent-Length: 40\r\n\r\n" + HIDDEN,
        GET + b"A: b\rContent-Length: 40\r\n\r\n" + HIDDEN,
        GET + b"A: b\x00c\r\n\r\n" + HIDDEN,
        GET + b"A\x00: b\r\n\r\n" + HIDDEN,
        GET + b"A: b\r\n Content-Length: 40\r\n\r\n" + HIDDEN,
        GET + b" A: b\r\n\r\n" + HIDDEN,
        GET + b": b\r\n\r\n" + HIDDEN,
        GET + b"no colon\r\n\r\n" + HIDDEN,
        b"GET /v2/\x00 HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
        b"GET /v2/ HTTP/1.1 extra\r\nHost: x\r\n\r\n" + HIDDEN,
        b"GET /v2/ HTTP/2.0\r\nHost: x\r\n\r\n" + HIDDEN,
        b"GET /v2/ HTTP/9.9\r\nHost: x\r\n\r\n" + HIDDEN,
        b"GET /v2/\r\n\r\n" + HIDDEN,
        b"G\xc3\x8bT /v2/ HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
    ],
    ids=lambda sent: repr(sent.removesuffix(HIDDEN))[2:-1].replace("\\r\\n", "|"),
)
def test_what_is_ambiguous_gets_one_refusal(server: Mirror, sent: bytes) -> None:
    with Wire(server) as wire:
        wire.send(sent)
        said = wire.read_to_end()
    assert statuses(said) == [400], said
    assert server.get("/healthz").status == 200
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_an_honest_body_ends_the_connection(server: Mirror, method: bytes) -> None:
    head = method + b" /v2/_catalog HTTP/1.1\r\nHost: x\r\n"
    length = f"Content-Length: {len(HIDDEN)}\r\n\r\n".encode()
    with Wire(server) as wire:
        wire.send(head + length + HIDDEN + b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        said = wire.read_to_end()
    assert statuses(said) == [405 if method == b"POST" else 404]
    assert b"connection: close" in said.lower()


@pytest.mark.parametrize("method", [b"CONNECT x:443", b"OPTIONS *", b"TRACE /v2/", b"GET x:80"])
def test_strange_targets_are_refused(server: Mirror, method: bytes) -> None:
    with Wire(server) as wire:
        wire.send(method + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        [status] = statuses(wire.read_to_end())
    assert 400 <= status < 500
    assert "Traceback" not in server.log()


def test_an_upgrade_is_not_made(server: Mirror) -> None:
    with Wire(server) as wire:
        wire.send(GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n")
        assert statuses(wire.read_some()) == [200]
        assert statuses(wire.ask()) == [200]
