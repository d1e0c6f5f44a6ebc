"""Cold blobs: one upstream download for all, streamed while it arrives, whatever breaks."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import BytesIO

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import Content, content, image, random_blob
from tests.serve.scene import MIB, Scene
from tests.upstream_faults import Fault

CUT_SHORT = (http.client.IncompleteRead, ConnectionError)


def test_32_cold_clients_of_four_repositories_cost_one_download(scene: Scene) -> None:
    blob = random_blob(8 * MIB, seed=1)
    names = [f"team/app{n}" for n in range(4)]
    for name in names:
        scene.upstream.add_content(name, blob)
    scene.upstream.fault("/blobs/", Fault(stall_after=2 * MIB))
    scene.start()
    first_bytes = threading.Barrier(33, timeout=30)

    def client(number: int) -> bytes:
        with scene.open(blob, names[number % 4]) as response:
            assert response.status == 200
            head = response.read(1)
            first_bytes.wait()
            return head + response.read()

    with ThreadPoolExecutor(32) as pool:
        bodies = [pool.submit(client, number) for number in range(32)]
        # Every client has its first byte while the upstream still holds most of the blob back.
        first_bytes.wait()
        scene.upstream.heal()
        assert all(body.result() == blob.data for body in bodies)
    assert scene.upstream.bytes_sent("/blobs/") == blob.size


def test_a_cut_connection_resumes_inside_the_same_response(scene: Scene) -> None:
    blob = scene.blob(6 * MIB, Fault(cut_after=2 * MIB), times=1)
    server = scene.start()
    answer = scene.get(blob)
    assert answer.body == blob.data
    assert "resuming" in server.log()
    assert scene.upstream.bytes_sent("/blobs/") == blob.size


def test_an_upstream_without_ranges_is_read_again_from_its_start(scene: Scene) -> None:
    blob = scene.blob(3 * MIB, Fault(cut_after=MIB, no_range=True), times=1)
    scene.upstream.fault("/blobs/", Fault(no_range=True))
    scene.start()
    assert scene.get(blob).body == blob.data


def test_a_stalled_connection_is_replaced(scene: Scene) -> None:
    blob = scene.blob(3 * MIB, Fault(stall_after=MIB), times=1)
    scene.start(timeouts={"stall": "1s"})
    assert scene.get(blob).body == blob.data


def test_wrong_bytes_are_cut_short_and_never_kept(scene: Scene) -> None:
    blob = scene.blob(2 * MIB, Fault(flip_at=MIB))
    server = scene.start()
    with scene.open(blob) as response, pytest.raises(CUT_SHORT):
        response.read()
    server.wait_for_log("expected digest")
    assert f'upstream={scene.upstream.registry} reason="blob: expected digest' in server.log()
    assert not scene.is_stored(blob)


def test_wrong_bytes_once_are_fetched_anew(scene: Scene) -> None:
    blob = scene.blob(MIB, Fault(flip_at=10), times=1)
    server = scene.start()
    with scene.open(blob) as response, pytest.raises(CUT_SHORT):
        response.read()
    server.wait_for_file(f"blobs/{blob.encoded}")
    assert scene.get(blob).body == blob.data


def test_a_wrong_length_is_refused(scene: Scene) -> None:
    blob = scene.blob(MIB, Fault(length_delta=-100))
    scene.start()
    with scene.open(blob) as response, pytest.raises(CUT_SHORT):
        response.read()
    assert not scene.is_stored(blob)


def test_a_client_that_leaves_does_not_end_the_fill(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    server = scene.start()
    with scene.open(blob) as response:
        response.read(1)
    scene.upstream.heal()
    server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_range_of_an_arriving_blob_is_answered_from_the_fill(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=2 * MIB))
    scene.start()
    with scene.open(blob) as response:
        response.read(1)
        answer = scene.get(blob, {"Range": "bytes=100-199"})
        assert answer.status == 206
        assert answer.body == blob.data[100:200]
        assert answer.headers["content-range"] == f"bytes 100-199/{blob.size}"
        scene.upstream.heal()


def test_a_range_far_ahead_is_fetched_first(scene: Scene) -> None:
    blob = scene.blob(16 * MIB, Fault(stall_after=MIB), times=1)
    scene.start(segment="4MiB")
    with scene.open(blob) as response:
        response.read(1)
        start = 14 * MIB
        wanted = {"Range": f"bytes={start}-{start + 9}"}
        answer = scene.get(blob, wanted)
        assert answer.body == blob.data[start : start + 10]
        scene.upstream.release()
        response.read()


@pytest.mark.parametrize("asked", ["bytes=-51", "bytes=0-9,16777165-16777215"])
def test_the_footer_of_a_lazily_read_blob_does_not_wait_for_the_rest(
    scene: Scene, asked: str
) -> None:
    blob = scene.blob(16 * MIB, Fault(stall_after=MIB), times=1)
    scene.start(segment="4MiB")
    answer = scene.get(blob, {"Range": asked})
    assert answer.status == 206
    assert blob.data[-51:] in answer.body
    assert not scene.is_stored(blob)
    scene.upstream.release()
    assert scene.get(blob).body == blob.data


def test_a_download_that_goes_on_does_not_end_before_the_blob_is_verified(scene: Scene) -> None:
    blob = scene.blob(MIB, Fault(flip_at=10))
    scene.start()
    with pytest.raises(CUT_SHORT):
        scene.get(blob, {"Range": f"bytes={MIB - 1000}-"})


def test_a_large_slow_blob_uses_several_connections(scene: Scene) -> None:
    blob = scene.blob(16 * MIB, Fault(rate=2 * MIB))
    scene.start(segment="1MiB")
    received, at_once = b"", 0
    with scene.open(blob) as response:
        while chunk := response.read(256 * 1024):
            received += chunk
            running = [each for each in scene.upstream.seen("/blobs/") if not each.done]
            at_once = max(at_once, len(running))
    assert received == blob.data
    assert at_once >= 2
    assert scene.upstream.bytes_sent("/blobs/") == blob.size


def test_a_killed_server_resumes_where_it_stopped(scene: Scene) -> None:
    blob = scene.blob(6 * MIB, Fault(stall_after=4 * MIB), times=1)
    server = scene.start()
    with scene.open(blob) as response:
        response.read(3 * MIB)
        server.kill()
    scene.upstream.release()
    server.restart()
    assert scene.get(blob).body == blob.data
    resumed = [r for r in scene.upstream.requests if "range" in {k.lower() for k in r.headers}]
    assert resumed, "the second request asks for what is missing only"


def test_the_beginning_of_something_else_is_thrown_away_once_it_was_hashed(scene: Scene) -> None:
    blob = scene.blob(MIB)
    server = scene.start()
    staged = server.store / "pulls" / blob.encoded
    staged.write_bytes(b"x" * 1000)
    staged.with_name(f"{blob.encoded}.spans").write_text("size 1000\n0 1000\n")
    with scene.open(blob) as response, contextlib.suppress(*CUT_SHORT):
        response.read()
    server.wait_for_file(f"blobs/{blob.encoded}")
    assert scene.get(blob).body == blob.data


def lying_manifest(scene: Scene, repository: str, layer: Content, size: int) -> str:
    """Push a manifest that says this of the size of a layer; return its digest."""
    honest = image("honest")
    document = honest.top.json()
    document["layers"] = [{**layer.descriptor(), "size": size}]
    for each in (*honest.blobs, layer):
        scene.upstream.add_content(repository, each)
    lie = content(json.dumps(document).encode(), honest.top.media_type)
    scene.upstream.add_content(repository, lie)
    return lie.digest


@pytest.mark.parametrize("size", [0, 7, 20 * MIB])
def test_a_lie_about_a_size_costs_another_repository_nothing(scene: Scene, size: int) -> None:
    blob = scene.blob(8 * MIB)
    lie = lying_manifest(scene, "liar", blob, size)
    scene.start(background_fills=0)
    assert scene.manifest(lie, "liar").status == 200
    answer = scene.get(blob)
    assert (answer.status, answer.body) == (200, blob.data)


def test_what_has_arrived_is_kept_although_a_manifest_lies_about_its_size(scene: Scene) -> None:
    blob = scene.blob(8 * MIB, Fault(rate=8 * MIB, stall_after=6 * MIB), times=1)
    lie = lying_manifest(scene, scene.repository, blob, 7)
    server = scene.start(background_fills=0)
    with scene.open(blob) as response:
        response.read(5 * MIB)
        server.kill()
    scene.upstream.release()
    server.restart()
    scene.manifest(lie)
    scene.upstream.requests.clear()
    assert scene.get(blob).body == blob.data
    assert scene.upstream.bytes_sent(f"/blobs/{blob.digest}") <= 3 * MIB


def test_a_body_without_a_length_is_streamed_after_a_restart(scene: Scene) -> None:
    """The manifest that claims the size is in the store; the process that saw it has ended."""
    app = scene.upstream.add(scene.repository, image("app", layer_size=3 * MIB), tag="v1")
    layer = app.layers[0]
    server = scene.start(background_fills=0)
    assert scene.manifest("v1").status == 200
    server.restart()
    scene.upstream.fault("/blobs/", Fault(chunked=True, no_range=True, stall_after=MIB))
    with scene.open(layer) as response:
        head = response.read(MIB // 2)
        scene.upstream.heal()
        assert head + response.read() == layer.data


def test_a_body_whose_size_nothing_tells_is_streamed(scene: Scene) -> None:
    blob = scene.blob(8 * MIB, Fault(chunked=True, no_range=True, rate=2 * MIB))
    server = scene.start()
    with scene.open(blob) as response:
        assert response.status == 200
        assert response.getheader("Transfer-Encoding") == "chunked"
        head = response.read(MIB)
        assert not scene.is_stored(blob)
        assert head + response.read() == blob.data
    server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_client_without_chunks_gets_a_body_whose_size_nothing_tells(scene: Scene) -> None:
    """HTTP/1.0: the connection ends with the body."""
    blob = scene.blob(8 * MIB, Fault(chunked=True, no_range=True, rate=2 * MIB))
    server = scene.start()
    with socket.create_connection((server.host, server.port), 30) as client:
        client.sendall(f"GET {scene.path('blobs', blob.digest)} HTTP/1.0\r\n\r\n".encode())
        received = b"".join(iter(partial(client.recv, MIB), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert b"chunked" not in head.lower()
    assert body == blob.data


def test_a_wrong_body_whose_size_nothing_tells_is_cut_short(scene: Scene) -> None:
    fault = Fault(chunked=True, no_range=True, rate=2 * MIB, flip_at=10)
    blob = scene.blob(8 * MIB, fault)
    scene.start()
    with scene.open(blob) as response, pytest.raises(CUT_SHORT):
        response.read()
    assert not scene.is_stored(blob)


def test_workers_share_one_download(scene: Scene) -> None:
    blob = scene.blob(8 * MIB, Fault(rate=8 * MIB))
    scene.start(serve={"workers": 3})

    def client(_: int) -> bytes:
        return scene.get(blob).body

    with ThreadPoolExecutor(12) as pool:
        assert all(body == blob.data for body in pool.map(client, range(12)))
    assert scene.upstream.bytes_sent("/blobs/") == blob.size


def test_an_import_of_a_blob_that_is_arriving_cuts_nobody(scene: Scene) -> None:
    """Those who follow in other processes were promised the bytes of the fill."""
    blob = scene.blob(8 * MIB, Fault(rate=2 * MIB))
    server = scene.start(serve={"workers": 3})
    with ExitStack() as stack:
        responses = [stack.enter_context(scene.open(blob)) for _ in range(12)]
        bodies = [response.read(1000) for response in responses]
        store = Store(server.store)
        with store.blob_writer() as writer:
            writer.write(BytesIO(blob.data), blob.size, Digest.of(blob.data))
        for number, response in enumerate(responses):
            bodies[number] += response.read()
    assert all(body == blob.data for body in bodies)
    assert scene.upstream.bytes_sent("/blobs/") == blob.size


def test_sha512_blobs_are_verified_and_kept(scene: Scene) -> None:
    blob = scene.blob(MIB, algorithm="sha512")
    server = scene.start()
    assert scene.get(blob).body == blob.data
    server.wait_for_file(f"blobs/sha512-{blob.encoded}")


@pytest.mark.parametrize(
    ("header", "status"),
    [("bytes=0-0", 206), ("bytes=-5", 206), ("bytes=5-", 206), ("bytes=99999999-", 416)],
)
def test_ranges_of_a_stored_blob(scene: Scene, header: str, status: int) -> None:
    blob = scene.blob(1000)
    server = scene.start()
    scene.get(blob)
    server.wait_for_file(f"blobs/{blob.encoded}")
    answer = scene.get(blob, {"Range": header})
    assert answer.status == status
    if status == 206:
        first, last = header.removeprefix("bytes=").split("-")
        want = blob.data[int(first) : int(last) + 1 if last else None] if first else blob.data[-5:]
        assert answer.body == want
