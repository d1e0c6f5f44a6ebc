"""A bad upstream beside a healthy one: what is asked of the healthy one does not wait."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.images import Content, image, random_blob
from tests.parts.tools import require_tool
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MANY = 100


@pytest.fixture
def healthy() -> Iterator[FakeUpstream]:
    with FakeUpstream() as made:
        yield made


def blobs(upstream: FakeUpstream, count: int, size: int) -> list[Content]:
    made = [random_blob(size, seed=f"neighbour {n}") for n in range(count)]
    for blob in made:
        upstream.add_content("app", blob)
    return made


def get(server: Mirror, upstream: FakeUpstream, path: str, patience: float) -> int | None:
    """The status, the body read; None for a client that left before there was an answer."""
    host = urlsplit(server.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=patience)
    with contextlib.closing(connection):
        try:
            connection.request("GET", f"/v2/app/{path}?ns={upstream.registry}")
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (TimeoutError, http.client.HTTPException, ConnectionError):
            return None


def leave(server: Mirror, upstream: FakeUpstream, path: str, seconds: float) -> None:
    """A client that asks, and is gone after so many seconds whatever has come."""
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port)) as client:
        client.sendall(
            f"GET /v2/app/{path}?ns={upstream.registry} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
        time.sleep(seconds)


@pytest.mark.parametrize(
    "fault",
    [Fault(delay=60), Fault(stall_after=1000), Fault(rate=4000)],
    ids=["hangs", "stalls", "crawls"],
)
def test_a_hundred_blobs_of_a_bad_upstream_hold_up_no_other_upstream(
    upstream: FakeUpstream,
    healthy: FakeUpstream,
    mirror: Callable[..., Mirror],
    fault: Fault,
) -> None:
    bad = blobs(upstream, MANY, 1 << 20)
    upstream.fault("/blobs/", fault)
    pushed = healthy.add("app", image(layers=1), tag="v1")
    entries = [upstream_entry(each.url) for each in (upstream, healthy)]
    server = mirror({"upstreams": entries})
    with ThreadPoolExecutor(MANY) as pool:
        for blob in bad:
            pool.submit(leave, server, upstream, f"blobs/{blob.digest}", 3)
        while upstream.count("/blobs/") < 16:
            time.sleep(0.05)
        began = time.monotonic()
        assert get(server, healthy, "manifests/v1", 30) == 200
        for blob in pushed.blobs:
            assert get(server, healthy, f"blobs/{blob.digest}", 30) == 200
        took = time.monotonic() - began
        upstream.release()
    # Before, the first of these waited for more than a minute.
    assert took < 10


def test_a_queued_download_that_no_client_waits_for_is_never_asked_for(
    upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    first, second = blobs(upstream, 2, 1000)
    upstream.fault("/blobs/", Fault(delay=60))
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"fills": 1, "timeouts": {"answer": "1s"}},
        }
    )
    assert get(server, upstream, f"blobs/{first.digest}", 20) == 504
    assert get(server, upstream, f"blobs/{second.digest}", 20) == 504
    assert upstream.count("/blobs/") == 1
    upstream.heal()
    upstream.release()
    assert get(server, upstream, f"blobs/{first.digest}", 20) == 200
    assert upstream.count(second.digest) == 0
    assert get(server, upstream, f"blobs/{second.digest}", 20) == 200


def test_a_queued_download_does_not_ask_an_upstream_that_is_left_alone_by_then(
    upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    wanted = blobs(upstream, 12, 1000)
    upstream.fault("/blobs/", Fault(delay=60))
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"fills": 4, "retries": 0, "timeouts": {"headers": "1.5s"}},
        }
    )
    with ThreadPoolExecutor(len(wanted)) as pool:
        paths = [f"blobs/{blob.digest}" for blob in wanted]
        statuses = list(pool.map(lambda path: get(server, upstream, path, 30), paths))
    upstream.release()
    assert set(statuses) <= {502, 503, 504}
    # The first four timed out, which opened the breaker; the others were in the queue by then.
    assert upstream.count("/blobs/") <= 8


def test_a_slow_download_without_a_reader_is_given_up_and_resumed_when_asked(
    upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    (blob,) = blobs(upstream, 1, 400_000)
    upstream.fault("/blobs/", Fault(rate=4000))
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"unread": "1s"}})
    leave(server, upstream, f"blobs/{blob.digest}", 1)
    server.wait_for_log("fill given up")
    upstream.heal()
    assert get(server, upstream, f"blobs/{blob.digest}", 30) == 200
    assert upstream.bytes_sent("/blobs/") < 1.5 * blob.size


def test_a_slow_download_with_a_reader_goes_on(
    upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    (blob,) = blobs(upstream, 1, 16_000)
    upstream.fault("/blobs/", Fault(rate=4000))
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"unread": "1s"}})
    assert get(server, upstream, f"blobs/{blob.digest}", 30) == 200
    assert "given up" not in server.log()


def test_a_copy_by_skopeo_without_a_reader_is_not_taken_for_a_slow_download(
    upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    """skopeo tells no bytes before the blob is there."""
    require_tool("skopeo")
    pushed = upstream.add("app", image(layers=1, layer_size=400_000), tag="v1")
    upstream.fault("/blobs/", Fault(rate=100_000))
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url, backend="skopeo")],
            "fetch": {"unread": "1s"},
        }
    )
    assert get(server, upstream, "manifests/v1", 30) == 200
    for blob in pushed.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}", 30)
    assert "given up" not in server.log()


def test_a_layer_that_hangs_at_one_upstream_comes_from_the_other(
    mirror: Callable[..., Mirror], upstream: FakeUpstream, healthy: FakeUpstream
) -> None:
    """Images of two registries share it, so they share its download as a rule."""
    (blob,) = blobs(upstream, 1, 100_000)
    healthy.add_content("app", blob)
    upstream.fault("/blobs/", Fault(delay=60))
    server = mirror(
        {"upstreams": [upstream_entry(each.url) for each in (upstream, healthy)]},
    )
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(get, server, upstream, f"blobs/{blob.digest}", 60)
        server.wait_for(lambda: upstream.count("/blobs/") > 0, "asked")
        assert get(server, healthy, f"blobs/{blob.digest}", 15) == 200
        upstream.release()
        assert hanging.result() == 200
