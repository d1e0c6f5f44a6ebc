"""A disk that does not answer: no look-up returns, and none fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests.disk.disk import Disk, faulty_disk
from tests.images import image
from tests.serve.scene import Scene
from tests.server import Answer, Mirror
from tests.stores import put
from tests.upstream_faults import Fault

ANSWER_LIMIT = 20.0
LOOKS = ("getattr", "open", "read", "opendir")
HERE = image("here", layer_size=300_000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with faulty_disk(tmp_path / "faulty") as made:
        yield made
        made.release()


def hang(disk: Disk, server: Mirror) -> None:
    disk.hang(*LOOKS)
    server.wait_for_log("store hangs")


def timed(ask: Callable[[], Answer]) -> Answer:
    began = time.monotonic()
    answer = ask()
    assert time.monotonic() - began < ANSWER_LIMIT
    return answer


def test_clients_get_what_they_ask_for_from_the_upstream_while_the_disk_hangs(
    scene: Scene, disk: Disk
) -> None:
    app = scene.upstream.add("app", HERE, tag="v1")
    put(Store(disk.root / "store"), f"{scene.upstream.registry}/app:v1", app, resolved=time.time())
    server = scene.start(store=disk.root / "store")
    assert scene.manifest("v1").cache_status == "ociproxy; hit"
    # The first look that hangs is one that no probe has announced.
    disk.hang(*LOOKS)
    with ThreadPoolExecutor(4) as pool:
        tag = pool.submit(timed, partial(scene.manifest, "v1"))
        asked = [pool.submit(timed, partial(scene.get, blob)) for blob in app.blobs]
        for _ in range(20):
            assert server.get("/healthz").status == 200
            assert server.get("/v2/").status == 200
        got = [future.result() for future in asked]
    assert [answer.body for answer in got] == [blob.data for blob in app.blobs]
    assert tag.result().body == app.top.data
    server.wait_for_log("store hangs")
    for blob in app.blobs:
        assert timed(partial(scene.get, blob)).body == blob.data
    assert timed(lambda: scene.manifest("v1")).body == app.top.data
    assert timed(lambda: server.get("/readyz")).status == 503
    disk.release()
    server.wait_for_log("store answers again")
    for blob in app.blobs:
        assert scene.get(blob).cache_status == "ociproxy; hit"
    assert scene.manifest("v1").cache_status == "ociproxy; hit"
    assert server.get("/readyz").status == 200
    assert "Traceback" not in server.log()


def test_an_offline_client_hears_of_a_disk_that_hangs(scene: Scene, disk: Disk) -> None:
    app = scene.upstream.add("app", HERE, tag="v1")
    put(Store(disk.root / "store"), f"{scene.upstream.registry}/app:v1", app)
    server = scene.start(store=disk.root / "store", args=["--offline"])
    hang(disk, server)
    for answer in (timed(lambda: scene.manifest("v1")), timed(lambda: scene.get(app.blobs[0]))):
        assert answer.status == 503
        assert "does not answer" in answer.json()["errors"][0]["message"]
    assert server.get("/healthz").status == 200
    disk.release()
    server.wait_for_log("store answers again")
    assert scene.manifest("v1").body == app.top.data


def test_repositories_that_are_isolated_get_their_blobs_from_the_upstream_while_the_disk_hangs(
    scene: Scene, disk: Disk
) -> None:
    app = scene.upstream.add("app", HERE, tag="v1")
    server = scene.start(store=disk.root / "store", entry={"isolation": "repository"})
    assert scene.manifest("v1").body == app.top.data
    for blob in app.blobs:
        assert scene.get(blob).body == blob.data  # from now on it knows which ones are the app's
    hang(disk, server)
    for blob in app.blobs:
        assert timed(partial(scene.get, blob)).body == blob.data
        assert timed(lambda: server.get("/healthz")).status == 200


def test_a_client_that_joins_a_download_while_the_disk_hangs_holds_up_no_other(
    scene: Scene, disk: Disk
) -> None:
    """It opens the growing file, for which a program is asked that does not answer."""
    app = scene.upstream.add("app", HERE, tag="v1")
    layer = app.layers[0]
    server = scene.start(store=disk.root / "store")
    scene.upstream.fault(f"/blobs/{layer.digest}", Fault(stall_after=100_000))
    with ThreadPoolExecutor(1) as pool:
        assert scene.manifest("v1").body == app.top.data  # and it fetches ahead
        server.wait_for(lambda: scene.upstream.bytes_sent(layer.digest) >= 100_000, "begun")
        disk.hang("open", pattern="*/pulls/*")
        joined = pool.submit(timed, partial(scene.get, layer))
        server.wait_for(lambda: disk.waiting() > 0, "an open that hangs")
        for _ in range(5):
            assert server.get("/healthz").status == 200
        disk.release()
        scene.upstream.heal()
        assert joined.result().body == layer.data


def test_metrics_leave_out_what_a_disk_that_hangs_does_not_tell(
    mirror: Callable[..., Mirror], disk: Disk
) -> None:
    server = mirror({}, store=disk.root / "store", admin=True)
    assert "ociproxy_disk_free_bytes" in server.metrics()
    hang(disk, server)
    found = server.metrics()
    assert found["ociproxy_workers"] == 1
    assert "ociproxy_disk_free_bytes" not in found
    disk.release()
    server.wait_for(lambda: "ociproxy_disk_free_bytes" in server.metrics(), "the disk's numbers")
