"""One deadline holds for all that a request waits for."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from ociproxy.clock import Deadline, OutOfTime, time_left
from ociproxy.errors import UpstreamUnavailable
from ociproxy.fetch.retry import retrying
from ociproxy.oci.reference import Reference
from tests.fetch.conftest import TIMEOUTS, OpenBackend
from tests.fetch.contract import reference
from tests.fetch.peers import raw_server
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

LIMIT = 1.0
MARGIN = 3.0
"""Seconds that a busy machine may add."""


def test_the_earlier_of_two_deadlines_holds() -> None:
    assert time_left(7.0) == 7.0
    with Deadline.after(5.0).kept():
        with Deadline.after(60.0).kept():
            assert time_left() <= 5.0
        with Deadline.after(0.0).kept(), pytest.raises(OutOfTime):
            time_left(7.0)
        assert time_left(7.0) > 1.0
    assert time_left(7.0) == 7.0


def trickle(client: socket.socket) -> None:
    """A document that is never whole, byte by byte."""
    client.recv(65536)
    with contextlib.suppress(OSError):
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            client.sendall(b"{")
            time.sleep(0.1)


def ask_within(seconds: float, ask: Callable[[], object]) -> tuple[UpstreamUnavailable, float]:
    began = time.monotonic()
    with Deadline.after(seconds).kept(), pytest.raises(UpstreamUnavailable) as caught:
        ask()
    return caught.value, time.monotonic() - began


def test_a_document_that_trickles_ends_at_the_deadline(open_backend: OpenBackend) -> None:
    with raw_server(trickle) as name:
        backend = open_backend(name, scheme="http")
        error, seconds = ask_within(
            LIMIT, lambda: backend.fetch_manifest(Reference.parse(f"{name}/a/b:v1"))
        )
        assert error.reason == "no answer within 1 s"
        assert (error.timed_out, error.unreachable) == (True, False)
        assert seconds < LIMIT + MARGIN
        backend.close()


def test_a_slow_token_and_a_slow_answer_share_one_deadline(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """Each alone is within its time-out."""
    upstream.protect("team/app", TokenAuth())
    upstream.fault("/token", Fault(delay=1.0))
    upstream.fault("/manifests/", Fault(delay=60))
    backend = open_backend(upstream, timeouts=replace(TIMEOUTS, headers=30.0))
    error, seconds = ask_within(
        2.0, lambda: backend.fetch_manifest(reference(upstream, "team/app:v1"))
    )
    assert error.reason == "no answer within 2 s"
    assert seconds < 2.0 + MARGIN
    upstream.release()


def test_no_try_begins_after_the_deadline() -> None:
    tries: list[float] = []

    def fail() -> None:
        tries.append(time.monotonic())
        time.sleep(0.2)
        raise UpstreamUnavailable("r", "answered 500")

    began = time.monotonic()
    with Deadline.after(LIMIT).kept(), pytest.raises(UpstreamUnavailable, match="500"):
        retrying(tries=1000, wait_max=0.1, stopped=threading.Event())(fail)
    assert max(tries) - began < LIMIT + 0.5


@pytest.fixture
def hanging_resolver(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """getaddrinfo hangs for names below `.invalid` until the event is set."""
    original, release = socket.getaddrinfo, threading.Event()

    def resolve(host: str, *arguments: object, **options: object) -> object:
        if host.endswith(".invalid"):
            release.wait(60)
        return original(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return release


def test_a_resolver_that_hangs_ends_at_the_connect_time_out(
    open_backend: OpenBackend, hanging_resolver: threading.Event
) -> None:
    backend = open_backend("registry.invalid", timeouts=replace(TIMEOUTS, connect=0.5))
    before = {thread.name for thread in threading.enumerate()}
    assert "resolver" not in before
    began = time.monotonic()
    try:
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable, match=r"0\.5 s looking up its name") as caught:
                backend.fetch_manifest(Reference.parse("registry.invalid/a/b:v1"))
            assert (caught.value.timed_out, caught.value.unreachable) == (True, True)
        assert time.monotonic() - began < 1.5 + MARGIN
        # However often it is asked, one name costs one thread.
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("resolver") == 1
    finally:
        hanging_resolver.set()
