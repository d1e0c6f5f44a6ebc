"""Headers or an error within a bound, whatever the upstream does; never without an answer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ociproxy.config.settings import Timeouts
from tests.fetch.peers import raw_server
from tests.images import random_blob
from tests.serve.scene import MIB, Scene
from tests.server import Answer, Mirror
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
CONTRACT = 20.0
SHORT = {"connect": "1s", "headers": "1s", "answer": "3s"}
SHORT_LIMIT = 3.0
MARGIN = 2.0
"""Seconds that a busy machine may add."""
BLOB = random_blob(1000)
PATHS = (f"blobs/{BLOB.digest}", "manifests/v1", "tags/list")


def silent(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(4096):
            pass


def dripping(client: socket.socket) -> None:
    """Byte by byte, each well before any time-out of its own."""
    client.recv(4096)
    with contextlib.suppress(OSError):
        client.sendall(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        while True:
            client.sendall(b"x")
            time.sleep(0.2)


def hanging_up(client: socket.socket) -> None:
    client.recv(4096)


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that answers no packet: its queue of connections is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        time.sleep(0.1)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def ask(server: Mirror, registry: str, path: str, method: str = "GET") -> tuple[Answer, float]:
    began = time.monotonic()
    answer = server.request(method, f"/v2/app/{path}?ns={registry}", timeout=60)
    return answer, time.monotonic() - began


def assert_all_answered(
    mirror: MakeMirror, registry: str, scheme: str = "http", timeouts: object = SHORT
) -> None:
    server = mirror(
        {
            "upstreams": [{"name": registry, "scheme": scheme}],
            "fetch": {"timeouts": timeouts},
        }
    )
    wanted = [("GET", path) for path in PATHS] + [("HEAD", path) for path in PATHS[:2]]
    with ThreadPoolExecutor(len(wanted)) as pool:
        results = [pool.submit(ask, server, registry, path, method) for method, path in wanted]
        answers = [result.result() for result in results]
    for (method, _), (answer, seconds) in zip(wanted, answers, strict=True):
        assert seconds < SHORT_LIMIT + MARGIN
        assert answer.status in (502, 504)
        if method == "GET":
            [error] = json.loads(answer.body)["errors"]
            assert error["code"] == "UNAVAILABLE"
            assert registry in error["message"]
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("peer", [silent, dripping, hanging_up])
def test_a_peer_that_never_answers(
    mirror: MakeMirror, peer: Callable[[socket.socket], None], scheme: str
) -> None:
    # Under https the handshake is what never ends.
    with each_in_a_thread(peer) as registry:
        assert_all_answered(mirror, registry, scheme)


@pytest.mark.parametrize("scheme", ["http", "https", "auto"])
def test_an_address_that_swallows_packets(mirror: MakeMirror, scheme: str) -> None:
    with black_hole() as registry:
        assert_all_answered(mirror, registry, scheme)


def test_a_token_realm_that_never_answers(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.fault("/token", Fault(delay=60))
    assert_all_answered(mirror, upstream.registry)
    upstream.release()


def test_a_redirect_to_a_host_that_never_answers(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    with each_in_a_thread(silent) as storage:
        upstream.fault("/v2/", Fault(redirect=f"http://{storage}"))
        assert_all_answered(mirror, upstream.registry)


def test_the_defaults_keep_the_contract(mirror: MakeMirror) -> None:
    assert Timeouts().answer + 1 < CONTRACT
    assert Timeouts().revalidate < Timeouts().answer
    with each_in_a_thread(silent) as registry:
        server = mirror({"upstreams": [{"name": registry, "scheme": "http"}]})
        with ThreadPoolExecutor(len(PATHS)) as pool:
            results = [pool.submit(ask, server, registry, path) for path in PATHS]
            for result in results:
                answer, seconds = result.result()
                assert answer.status in (502, 504)
                assert seconds < CONTRACT


def test_one_silent_upstream_leaves_the_others_alone(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.add_content("app", BLOB)
    with each_in_a_thread(silent) as registry:
        server = mirror(
            {
                "upstreams": [
                    {"name": registry, "scheme": "http"},
                    {"name": upstream.registry, "scheme": "http"},
                ],
                "fetch": {"timeouts": SHORT, "requests": 2},
            }
        )
        with ThreadPoolExecutor(8) as pool:
            waiting = [
                pool.submit(ask, server, registry, f"manifests/v{number}") for number in range(8)
            ]
            answer, seconds = ask(server, upstream.registry, f"blobs/{BLOB.digest}")
            assert (answer.status, answer.body) == (200, BLOB.data)
            assert seconds < 1
            answer, _ = ask(server, upstream.registry, "manifests/v1")
            assert answer.status == 404
            assert not any(result.done() for result in waiting)
            assert all(result.result()[0].status in (502, 504) for result in waiting)


@contextmanager
def each_in_a_thread(peer: Callable[[socket.socket], None]) -> Iterator[str]:
    """`raw_server` answers one connection after the other; here they all hang at once."""
    threads: list[threading.Thread] = []
    clients: list[socket.socket] = []

    def start(client: socket.socket) -> None:
        clients.append(client.dup())
        threads.append(threading.Thread(target=peer, args=(clients[-1],)))
        threads[-1].start()

    try:
        with raw_server(start) as registry:
            yield registry
    finally:
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        for client in clients:
            client.close()


def test_a_request_line_tells_the_upstreams_time_apart(scene: Scene) -> None:
    blob = scene.blob(MIB, Fault(delay=1.0), times=1)
    server = scene.start()
    for _ in range(2):
        assert scene.get(blob).status == 200
        server.wait_for_file(f"blobs/{blob.encoded}")
    server.wait_for(lambda: server.log().count(" request method=GET ") == 2)
    cold, warm = (
        dict(re.findall(r"(\w+)=(\S+)", line))
        for line in server.log().splitlines()
        if " request method=GET " in line
    )
    assert float(cold["seconds"]) >= float(cold["first_byte"]) >= 1
    assert float(cold["upstream_seconds"]) >= 1
    assert float(warm["first_byte"]) < 1
    assert "upstream_seconds" not in warm
