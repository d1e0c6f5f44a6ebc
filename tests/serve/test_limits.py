"""What one client may cost: sizes, times and numbers, each tried over a raw socket."""

from __future__ import annotations

import contextlib
import json
import resource
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import image, random_blob
from tests.serve.wire import Wire, statuses
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
REQUEST = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"


def error_of(said: bytes) -> tuple[int, str]:
    """Status and code of the one response that a server said."""
    [status] = statuses(said)
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    [error] = json.loads(body)["errors"]
    assert set(error) == {"code", "message", "detail"}
    return status, str(error["code"])


def serving(mirror: MakeMirror, **serve: object) -> Mirror:
    return mirror({"serve": serve})


@pytest.mark.parametrize(
    ("sent", "limits"),
    [
        (b"GET /v2/" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", {"line_limit": 2048}),
        (REQUEST + b"A: " + b"a" * 3000 + b"\r\n\r\n", {"header_limit": 2048}),
        (REQUEST + b"a" * 3000 + b": a\r\n\r\n", {"header_limit": 2048}),
        (REQUEST + b"A: aaaa\r\n" * 20 + b"\r\n", {"headers": 8}),
        (REQUEST + (b"A: " + b"a" * 900 + b"\r\n") * 40, {"head_limit": 4096}),
        # It arrives in one piece and is a request; it is too large all the same.
        (
            REQUEST + b"".join(b"A%d: %s\r\n" % (n, b"a" * 2000) for n in range(50)) + b"\r\n",
            {"head_limit": 32768},
        ),
    ],
    ids=["line", "header value", "header name", "headers", "endless head", "large head"],
)
def test_a_request_that_is_too_large_is_refused(
    mirror: MakeMirror, sent: bytes, limits: dict[str, int]
) -> None:
    server = serving(mirror, **limits)
    with Wire(server) as wire:
        wire.send(sent)
        status, code = error_of(wire.read_to_end())
    assert (status, code) in ((431, "REQUEST_INVALID"), (400, "REQUEST_INVALID"))
    assert "Traceback" not in server.log()
    assert server.get("/healthz").status == 200


def test_a_request_just_below_the_limits_is_answered(mirror: MakeMirror) -> None:
    server = serving(mirror, header_limit=2048, line_limit=2048, headers=16, head_limit=65536)
    with Wire(server) as wire:
        headers = b"".join(b"A%d: %s\r\n" % (n, b"a" * 2000) for n in range(14))
        wire.send(REQUEST + headers + b"\r\n")
        assert statuses(wire.read_some()) == [200]


def test_a_head_that_comes_byte_by_byte_has_its_time_and_no_more(mirror: MakeMirror) -> None:
    server = serving(mirror, head_timeout="1s")
    with Wire(server) as wire:
        stopped = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stopped.wait(0.05):
                    wire.send(b"A")

        began = time.monotonic()
        wire.send(REQUEST + b"X: ")
        dripping = threading.Thread(target=drip)
        dripping.start()
        said = wire.read_to_end()
        took = time.monotonic() - began
        stopped.set()
        dripping.join()
    assert error_of(said) == (408, "REQUEST_INVALID")
    assert 0.9 < took < 5


def test_the_second_request_of_a_connection_has_its_time_too(mirror: MakeMirror) -> None:
    server = serving(mirror, head_timeout="1s")
    with Wire(server) as wire:
        assert statuses(wire.ask()) == [200]
        wire.send(b"GET /v2/")
        assert error_of(wire.read_to_end()) == (408, "REQUEST_INVALID")


def test_a_connection_without_a_request_is_closed_in_silence(mirror: MakeMirror) -> None:
    server = serving(mirror, head_timeout="1s")
    with Wire(server) as wire:
        began = time.monotonic()
        assert wire.read_to_end() == b""
        assert 0.9 < time.monotonic() - began < 5


def test_a_client_that_tries_https_first_is_named_once(mirror: MakeMirror) -> None:
    """The answer is plain HTTP: by that skopeo and containerd know to do without TLS."""
    server = serving(mirror)
    for _ in range(3):
        hello = ssl.MemoryBIO()
        client = ssl.create_default_context().wrap_bio(
            ssl.MemoryBIO(), hello, server_hostname="mirror.example"
        )
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        with Wire(server) as wire:
            wire.send(hello.read())
            assert error_of(wire.read_to_end()) == (400, "REQUEST_INVALID")
    with Wire(server) as wire:
        wire.send(b"\x17\x03\x03 neither\r\n\r\n")
        wire.read_to_end()
    server.wait_for_log('reason="not an HTTP/1.1 request"')
    told = 'client refused client=127.0.0.1 reason="HTTPS on a port of plain HTTP'
    assert server.log().count(told) == 1
    assert server.log().count("client refused") == 2


def test_an_idle_connection_is_kept_for_keepalive(mirror: MakeMirror) -> None:
    server = serving(mirror, head_timeout="1s", keepalive="3s")
    with Wire(server) as wire:
        assert statuses(wire.ask()) == [200]
        time.sleep(1.5)
        assert statuses(wire.ask()) == [200]
        assert 2 < wire.seconds_until_closed() < 8


def test_half_a_request_behind_a_running_one_does_not_end_that(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(1 << 20)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=1 << 19))
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "serve": {"head_timeout": "3s"}})
    with Wire(server) as wire:
        path = f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}"
        wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        said = wire.read_some()
        # More than a head may have, so it is not even read to its end.
        with contextlib.suppress(TimeoutError):
            wire.socket.settimeout(1)
            wire.send(b"GET /v2/ HTTP/1.1\r\n" + b"A: " + b"a" * (16 << 20))
        time.sleep(4)
        upstream.release()
        wire.socket.settimeout(10)
        while len(said.partition(b"\r\n\r\n")[2]) < blob.size and (part := wire.read_some()):
            said += part
        assert said.partition(b"\r\n\r\n")[2][: blob.size] == blob.data
    assert server.peak_rss() < 200 << 20


def test_a_slow_client_gets_the_whole_answer_before_what_is_wrong_behind_it(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(8 << 20)
    upstream.add_content("app", blob)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    assert server.blob(upstream.registry, "app", blob.digest).status == 200
    with Wire(server, receive_buffer=64 << 10) as wire:
        path = f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}"
        wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        said = wire.read_some()
        with contextlib.suppress(TimeoutError):
            wire.socket.settimeout(1)
            wire.send(b"GET /v2/ HTTP/1.1\r\n" + b"A: " + b"a" * (16 << 20))
        wire.socket.settimeout(10)
        # The server has handed its last bytes to its kernel long before they are read here.
        while part := wire.read_some():
            said += part
            time.sleep(0.002)
        assert said.partition(b"\r\n\r\n")[2][: blob.size] == blob.data
    assert b"431" in said[-1000:] or b"REQUEST_INVALID" in said[-1000:]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_not_read(mirror: MakeMirror, chunked: bool) -> None:
    server = serving(mirror)
    before = server.peak_rss()
    with Wire(server) as wire:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000000"
        wire.send(b"PUT /v2/app/manifests/v1 HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        piece = b"10000\r\n" + b"a" * 65536 + b"\r\n" if chunked else b"a" * 65536
        said, began = b"", time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10:
                wire.send(piece)
        with contextlib.suppress(OSError):
            said = wire.read_to_end()
        assert time.monotonic() - began < 8
    assert statuses(said) == [405]
    assert server.peak_rss() - before < 16 << 20


def test_a_write_with_a_small_body_hears_why_it_is_refused(mirror: MakeMirror) -> None:
    server = serving(mirror)
    with Wire(server) as wire:
        wire.send(b"PUT /v2/a/manifests/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        assert statuses(wire.read_some()) == [405]


def test_a_compressed_body_is_not_unpacked(mirror: MakeMirror) -> None:
    server = serving(mirror)
    with Wire(server) as wire:
        wire.send(
            b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
            b"Content-Length: 9\r\n\r\nnot gzip!"
        )
        assert statuses(wire.read_some()) == [405]
    assert "Traceback" not in server.log()


def test_connections_above_the_cap_hear_503_and_later_ones_are_let_in(
    mirror: MakeMirror,
) -> None:
    server = serving(mirror, connections=8, head_timeout="60s")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Wire(server)) for _ in range(8)]
        assert all(statuses(wire.ask()) == [200] for wire in held)
        with Wire(server) as late:
            late.send(REQUEST + b"\r\n")
            said = late.read_to_end()
        assert error_of(said) == (503, "UNAVAILABLE")
        assert b"\r\nRetry-After: 5\r\n" in said
        # Far above the cap no client is answered, and no connection is kept.
        crowd = [stack.enter_context(Wire(server)) for _ in range(100)]
        assert [wire.read_to_end() for wire in crowd] == [b""] * 100
        server.wait_for_log("too many connections")
        assert all(statuses(wire.ask()) == [200] for wire in held)
    deadline = time.monotonic() + 5
    while server.get("/v2/").status != 200:
        assert time.monotonic() < deadline


def test_too_few_files_lower_the_cap(mirror: MakeMirror) -> None:
    # A hard limit cannot be raised: `prlimit` sets it on the way to the server.
    server = mirror({"serve": {"connections": 4096}}, before=["prlimit", "--nofile=512:512"])
    assert "fewer connections than configured connections=64 configured=4096" in server.log()


def test_without_files_for_clients_they_wait_until_there_are_some(mirror: MakeMirror) -> None:
    server = serving(mirror)
    assert server.process is not None
    pid = server.process.pid
    was = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(file.name) for file in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, was[1]))
    # Free numbers below the highest are still given out.
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(highest + 2)]
        for wire in wires:
            wire.send(REQUEST + b"\r\n")
        server.wait_for_log("cannot accept clients")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, was)
        assert [statuses(wire.read_some()) for wire in wires] == [[200]] * len(wires)
    assert "Traceback" not in server.log()


def test_fills_above_the_queue_hear_503_and_what_is_stored_is_served(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    blobs = [upstream.add_content("app", random_blob(2000, seed=n)) for n in range(6)]
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"fills": 2, "queue": 3, "background_fills": 0},
        }
    )
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    upstream.fault("/blobs/", Fault(stall_after=1000))
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Wire(server)) for _ in range(5)]
        for wire, blob in zip(waiting, blobs, strict=False):
            path = f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}"
            wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            # Once this is answered the server has begun with what was sent before.
            assert server.get("/healthz").status == 200
        refused = server.blob(upstream.registry, "app", blobs[5].digest)
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["errors"][0]["code"] == "UNAVAILABLE"
        assert server.manifest(upstream.registry, "app", "v1").status == 200
        upstream.heal()
        upstream.release()
        for wire, blob in zip(waiting, blobs, strict=False):
            assert wire.read_to_end().partition(b"\r\n\r\n")[2] == blob.data
    assert server.blob(upstream.registry, "app", blobs[5].digest).body == blobs[5].data


def test_questions_above_the_queue_hear_503(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"requests": 2, "queue": 1, "timeouts": {"answer": "3s"}},
        }
    )
    upstream.fault("/manifests/", Fault(delay=2.5))
    found: list[int] = []

    def ask(tag: str) -> None:
        found.append(server.manifest(upstream.registry, "app", tag).status)

    asking = [threading.Thread(target=ask, args=(f"v{n}",)) for n in range(6)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert found.count(503) == 3, found


def test_no_answer_names_the_library(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    paths = ["/v2/", "/healthz", "/readyz", "/nothing", "/v2/_catalog", "/v2/app/manifests/!"]
    paths.append(f"/v2/app/manifests/v1?ns={upstream.registry}")
    for path in paths:
        assert server.get(path).headers["server"] == "ociproxy", path
    with Wire(server) as wire:
        wire.send(b"nonsense\r\n\r\n")
        said = wire.read_to_end()
    assert b"\r\nServer: ociproxy\r\n" in said
    assert b"aiohttp" not in said.lower()
