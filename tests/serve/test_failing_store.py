"""A store that cannot keep what comes: clients get it all the same, verified, and hits go on."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.images import image
from tests.parts.tools import small_disk
from tests.serve.scene import MIB, Scene
from tests.server import Mirror
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A store on a disk of 8 MiB."""
    with small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


def fill_up(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def memory_of_relays(server: Mirror) -> int:
    """Bytes in memory of the files that pass through."""
    assert server.process is not None
    held = {}
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if path.readlink().name.startswith("memfd:blob"):
                state = path.stat()
                held[state.st_ino] = state.st_blocks * 512
    return sum(held.values())


def test_a_blob_that_the_disk_has_no_room_for_reaches_the_client(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    server = scene.start(store=disk)
    answer = scene.get(blob)
    assert (answer.status, answer.body) == (200, blob.data)
    assert answer.headers["content-length"] == str(blob.size)
    assert answer.cache_status == "ociproxy; fwd=miss; detail=not-stored"
    assert not scene.is_stored(blob)
    assert "passing through" in server.log()
    server.wait_for_log(f"bytes={blob.size} kept=False")
    assert "no space left" in server.log()


def test_a_disk_that_gets_full_while_a_blob_arrives_cuts_no_client(
    scene: Scene, disk: Path
) -> None:
    blob = scene.blob(7 * MIB, Fault(rate=4 * MIB))
    server = scene.start(store=disk)
    with scene.open(blob) as response:
        head = response.read(MIB)
        fill_up(disk)
        assert head + response.read() == blob.data
    assert not scene.is_stored(blob)
    (disk / "filler").unlink()
    scene.upstream.heal()
    # Without a restart the store keeps what comes again.
    assert scene.get(blob).body == blob.data
    server.wait_for_file(f"blobs/{blob.encoded}")


def test_an_image_can_be_pulled_through_a_full_disk(scene: Scene, disk: Path) -> None:
    hit = scene.upstream.add("app", image("hit"), tag="old")
    app = scene.upstream.add("app", image("app", layer_size=MIB), tag="v1")
    server = scene.start(store=disk)
    assert scene.manifest("old").status == 200
    for blob in hit.blobs:
        scene.get(blob)
        server.wait_for_file(f"blobs/{blob.encoded}")
    fill_up(disk)
    for _ in range(2):
        answer = scene.manifest("v1")
        assert (answer.status, answer.body) == (200, app.top.data)
        for blob in app.blobs:
            answer = scene.get(blob)
            assert (answer.status, answer.body) == (200, blob.data)
    assert scene.manifest("old").cache_status == "ociproxy; hit"
    for blob in hit.blobs:
        assert scene.get(blob).cache_status == "ociproxy; hit"
    assert (
        scene.get(app.layers[0], {"Range": "bytes=900000-900099"}).body
        == (app.layers[0].data[900_000:900_100])
    )


def test_an_image_can_be_pulled_through_a_disk_that_became_read_only(
    scene: Scene, disk: Path
) -> None:
    app = scene.upstream.add("app", image("app", layer_size=MIB), tag="v1")
    scene.start(store=disk)
    mount("-o", "remount,ro", disk)
    assert scene.manifest("v1").body == app.top.data
    for blob in app.blobs:
        assert scene.get(blob).body == blob.data
    mount("-o", "remount,rw", disk)


def test_wrong_bytes_are_not_whole_for_a_client_although_nothing_is_stored(
    scene: Scene, disk: Path
) -> None:
    blob = scene.blob(24 * MIB, Fault(flip_at=20 * MIB))
    scene.start(store=disk)
    with scene.open(blob) as response, pytest.raises(http.client.IncompleteRead):
        response.read()


def test_a_broken_connection_is_resumed(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB, Fault(cut_after=10 * MIB), times=2)
    scene.start(store=disk)
    assert scene.get(blob).body == blob.data


def test_a_body_whose_size_nothing_tells_passes_through(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB, Fault(chunked=True, no_range=True))
    scene.start(store=disk)
    assert scene.get(blob).body == blob.data


def test_memory_is_bounded_with_clients_that_read_slowly(scene: Scene, disk: Path) -> None:
    blob = scene.blob(64 * MIB)
    server = scene.start(store=disk, fills=32)
    with contextlib.ExitStack() as stack:
        responses = [stack.enter_context(scene.open(blob)) for _ in range(12)]
        heads = [response.read(MIB) for response in responses]
        assert 0 < memory_of_relays(server) <= 12 * 5 * MIB
        with ThreadPoolExecutor(12) as pool:
            tails = list(pool.map(lambda response: response.read(), responses))
    assert all(head + tail == blob.data for head, tail in zip(heads, tails, strict=True))


def test_a_disk_without_inodes_harms_no_client(scene: Scene, disk: Path) -> None:
    mount("-o", "remount,nr_inodes=64", disk)
    app = scene.upstream.add("app", image("app", layer_size=MIB), tag="v1")
    scene.start(store=disk)
    with contextlib.suppress(OSError):
        for number in range(64):
            (disk / f"filler-{number}").touch(exist_ok=False)
    assert scene.manifest("v1").body == app.top.data
    for blob in app.blobs:
        assert scene.get(blob).body == blob.data


def test_more_clients_than_may_pass_are_told_to_come_again(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    scene.start(store=disk)
    with contextlib.ExitStack() as stack:
        responses = [stack.enter_context(scene.open(blob)) for _ in range(18)]
        statuses = [response.status for response in responses]
        assert statuses.count(200) == 16
        assert statuses.count(503) == 2
        assert all(r.getheader("Retry-After") for r in responses if r.status == 503)


def test_a_client_that_leaves_frees_what_passes_through(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    server = scene.start(store=disk, unread="1s")
    with scene.open(blob) as response:
        response.read(MIB)
        server.wait_for(lambda: memory_of_relays(server) > 0, "memory in use")
    server.wait_for(lambda: memory_of_relays(server) == 0, "memory freed")


def test_ranges_in_any_order_are_the_blobs_bytes(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    scene.start(store=disk)
    answer = scene.get(blob, {"Range": "bytes=20000000-20000099,1000-1099"})
    assert blob.data[20_000_000:20_000_100] in answer.body
    assert blob.data[1000:1100] in answer.body


def test_the_next_endpoint_goes_on_where_one_broke(
    scene: Scene,
    disk: Path,
    make_upstream: Callable[..., FakeUpstream],
    mirror: Callable[..., Mirror],
) -> None:
    blob = scene.blob(24 * MIB, Fault(cut_after=10 * MIB))
    other = make_upstream()
    other.add_content(scene.repository, blob)
    name = scene.upstream.registry
    entry = {"name": name, "endpoints": [scene.upstream.url, other.url]}
    server = mirror({"upstreams": [entry]}, store=disk)
    assert server.blob(name, scene.repository, blob.digest).body == blob.data


def test_a_disk_that_tells_no_size_keeps_what_comes(scene: Scene, tmp_path: Path) -> None:
    blob = scene.blob(MIB)
    with small_disk(tmp_path / "boundless", "0") as folder:
        server = scene.start(store=folder)
        assert scene.get(blob).body == blob.data
        server.wait_for_file(f"blobs/{blob.encoded}")
        server.stop()


def test_clients_that_leave_let_others_pass(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    scene.start(store=disk)
    for _ in range(20):
        with scene.open(blob) as response:
            assert response.status == 200
            response.read(1000)


def test_clients_that_have_the_blob_let_others_pass(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    scene.start(store=disk)
    for _ in range(20):
        assert scene.get(blob, {"If-None-Match": f'"{blob.digest}"'}).status == 304
    for _ in range(20):
        assert scene.get(blob, {"Range": "bytes=99999999-"}).status == 416
    assert scene.get(blob).body == blob.data


def test_an_upstream_that_is_back_serves_through_a_full_disk(scene: Scene, disk: Path) -> None:
    blob = scene.blob(24 * MIB)
    server = scene.start(store=disk, retries=1)
    scene.upstream.stop_listening()
    assert scene.get(blob).status == 502
    server.wait_for_log("upstream paused")
    scene.upstream.listen_again()
    end = time.monotonic() + 10
    while (answer := scene.get(blob)).status != 200 and time.monotonic() < end:
        time.sleep(0.5)
    assert answer.body == blob.data
