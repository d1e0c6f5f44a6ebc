"""Cold blobs: one upstream download for all, streamed while it arrives, whatever breaks."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from tests.images import image, random_blob
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1024 * 1024
MakeMirror = Callable[..., Mirror]


def mirror_of(mirror: MakeMirror, upstream: FakeUpstream, **fetch: object) -> Mirror:
    return mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": fetch})


@contextmanager
def open_blob(
    mirror: Mirror, upstream: FakeUpstream, repository: str, digest: str
) -> Iterator[http.client.HTTPResponse]:
    where = urlsplit(mirror.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    try:
        connection.request("GET", f"/v2/{repository}/blobs/{digest}?ns={upstream.registry}")
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def test_32_cold_clients_of_four_repositories_cost_one_download(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(8 * MIB, seed=1)
    names = [f"team/app{n}" for n in range(4)]
    for name in names:
        upstream.add_content(name, blob)
    upstream.fault("/blobs/", Fault(stall_after=2 * MIB))
    server = mirror_of(mirror, upstream)
    first_bytes = threading.Barrier(33, timeout=30)

    def client(number: int) -> bytes:
        with open_blob(server, upstream, names[number % 4], blob.digest) as response:
            assert response.status == 200
            head = response.read(1)
            first_bytes.wait()
            return head + response.read()

    with ThreadPoolExecutor(32) as pool:
        bodies = [pool.submit(client, number) for number in range(32)]
        # Every client has its first byte while the upstream still holds most of the blob back.
        first_bytes.wait()
        upstream.heal()
        upstream.release()
        assert all(body.result() == blob.data for body in bodies)
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_a_cut_connection_resumes_inside_the_same_response(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(6 * MIB, seed=2)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(cut_after=2 * MIB), times=1)
    server = mirror_of(mirror, upstream)
    answer = server.blob(upstream.registry, "app", blob.digest)
    assert answer.body == blob.data
    assert "resuming" in server.log()
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_an_upstream_without_ranges_is_read_again_from_its_start(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(3 * MIB, seed=3)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(cut_after=MIB, no_range=True), times=1)
    upstream.fault("/blobs/", Fault(no_range=True))
    server = mirror_of(mirror, upstream)
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data


def test_a_stalled_connection_is_replaced(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(3 * MIB, seed=4)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=MIB), times=1)
    server = mirror_of(mirror, upstream, timeouts={"stall": "1s"})
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data


def test_wrong_bytes_are_cut_short_and_never_kept(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(2 * MIB, seed=5)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(flip_at=MIB))
    server = mirror_of(mirror, upstream)
    with (
        open_blob(server, upstream, "app", blob.digest) as response,
        pytest.raises((http.client.IncompleteRead, ConnectionError)),
    ):
        response.read()
    server.wait_for_log("expected digest")
    assert not (server.store / "blobs" / blob.encoded).exists()


def test_wrong_bytes_once_are_fetched_anew(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(MIB, seed=6)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(flip_at=10), times=1)
    server = mirror_of(mirror, upstream)
    with (
        open_blob(server, upstream, "app", blob.digest) as response,
        pytest.raises((http.client.IncompleteRead, ConnectionError)),
    ):
        response.read()
    server.wait_for_file(f"blobs/{blob.encoded}")
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data


def test_a_wrong_length_is_refused(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(MIB, seed=7)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(length_delta=-100))
    server = mirror_of(mirror, upstream)
    with (
        open_blob(server, upstream, "app", blob.digest) as response,
        pytest.raises((http.client.IncompleteRead, ConnectionError)),
    ):
        response.read()
    assert not (server.store / "blobs" / blob.encoded).exists()


def test_a_client_that_leaves_does_not_end_the_fill(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(4 * MIB, seed=8)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=MIB))
    server = mirror_of(mirror, upstream)
    with open_blob(server, upstream, "app", blob.digest) as response:
        response.read(1)
    upstream.heal()
    upstream.release()
    server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_range_of_an_arriving_blob_is_answered_from_the_fill(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(4 * MIB, seed=9)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=2 * MIB))
    server = mirror_of(mirror, upstream)
    with open_blob(server, upstream, "app", blob.digest) as response:
        response.read(1)
        answer = server.blob(upstream.registry, "app", blob.digest, {"Range": "bytes=100-199"})
        assert answer.status == 206
        assert answer.body == blob.data[100:200]
        assert answer.headers["content-range"] == f"bytes 100-199/{blob.size}"
        upstream.heal()
        upstream.release()


def test_a_range_far_ahead_is_fetched_first(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(16 * MIB, seed=10)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=MIB), times=1)
    server = mirror_of(mirror, upstream, segment="4MiB")
    with open_blob(server, upstream, "app", blob.digest) as response:
        response.read(1)
        start = 14 * MIB
        wanted = {"Range": f"bytes={start}-{start + 9}"}
        answer = server.blob(upstream.registry, "app", blob.digest, wanted)
        assert answer.body == blob.data[start : start + 10]
        upstream.release()
        response.read()


def test_a_large_slow_blob_uses_several_connections(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(16 * MIB, seed=11)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(rate=2 * MIB))
    server = mirror_of(mirror, upstream, segment="1MiB")
    received, at_once = b"", 0
    with open_blob(server, upstream, "app", blob.digest) as response:
        while chunk := response.read(256 * 1024):
            received += chunk
            running = [each for each in upstream.seen("/blobs/") if not each.done]
            at_once = max(at_once, len(running))
    assert received == blob.data
    assert at_once >= 2
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_a_killed_server_resumes_where_it_stopped(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(6 * MIB, seed=12)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=4 * MIB), times=1)
    server = mirror_of(mirror, upstream)
    with open_blob(server, upstream, "app", blob.digest) as response:
        response.read(3 * MIB)
        server.kill()
    upstream.release()
    server.restart()
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
    resumed = [r for r in upstream.requests if "range" in {k.lower() for k in r.headers}]
    assert resumed, "the second request asks for what is missing only"


def test_the_beginning_of_something_else_is_thrown_away(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app", layer_size=MIB)
    upstream.add("app", app, tag="v1")
    server = mirror_of(mirror, upstream, background_fills=0)
    server.manifest(upstream.registry, "app", "v1")
    layer = app.layers[0]
    staged = server.store / "pulls" / layer.encoded
    staged.write_bytes(b"x" * 1000)
    staged.with_name(f"{layer.encoded}.spans").write_text("size 1000\n0 1000\n")
    # The manifest says how large it is, so this cannot be it: no failed try comes first.
    assert server.blob(upstream.registry, "app", layer.digest).body == layer.data
    assert upstream.bytes_sent("/blobs/") == layer.size


def test_workers_share_one_download(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(8 * MIB, seed=13)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(rate=8 * MIB))
    server = mirror(
        {"upstreams": [upstream_entry(upstream.url)], "serve": {"workers": 3}},
    )

    def client(_: int) -> bytes:
        return server.blob(upstream.registry, "app", blob.digest).body

    with ThreadPoolExecutor(12) as pool:
        assert all(body == blob.data for body in pool.map(client, range(12)))
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_sha512_blobs_are_verified_and_kept(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    blob = random_blob(MIB, seed=14, algorithm="sha512")
    upstream.add_content("app", blob)
    server = mirror_of(mirror, upstream)
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
    server.wait_for_file(f"blobs/sha512-{blob.encoded}")


@pytest.mark.parametrize(
    ("header", "status"),
    [("bytes=0-0", 206), ("bytes=-5", 206), ("bytes=5-", 206), ("bytes=99999999-", 416)],
)
def test_ranges_of_a_stored_blob(
    mirror: MakeMirror, upstream: FakeUpstream, header: str, status: int
) -> None:
    blob = random_blob(1000, seed=15)
    upstream.add_content("app", blob)
    server = mirror_of(mirror, upstream)
    server.blob(upstream.registry, "app", blob.digest)
    server.wait_for_file(f"blobs/{blob.encoded}")
    answer = server.blob(upstream.registry, "app", blob.digest, {"Range": header})
    assert answer.status == status
    if status == 206:
        first, last = header.removeprefix("bytes=").split("-")
        want = blob.data[int(first) : int(last) + 1 if last else None] if first else blob.data[-5:]
        assert answer.body == want
