"""SIGHUP: a new configuration takes over, and what was begun before is finished."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.images import image
from tests.serve.scene import MIB, Scene
from tests.upstream_faults import Fault


def test_a_reload_drops_no_request_that_waits_for_its_upstream(scene: Scene) -> None:
    app = scene.upstream.add("app", image("app"), tag="v1")
    scene.upstream.fault("/manifests/", Fault(delay=30))
    server = scene.start()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(scene.manifest, "v1")
        server.wait_for(lambda: scene.upstream.count("/manifests/v1") == 1, "asked")
        server.reload()
        server.wait_for_log("configuration reloaded")
        scene.upstream.heal()
        answer = asking.result(20)
    assert (answer.status, answer.digest) == (200, app.digest)
    server.wait_for_log("status=200")


def test_a_reload_drops_no_response_that_is_being_sent(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    server = scene.start()
    with scene.open(blob) as response:
        head = response.read(1)
        server.reload()
        server.wait_for_log("configuration reloaded")
        scene.upstream.heal()
        assert head + response.read() == blob.data
    assert scene.upstream.count("/blobs/") == 1


def test_layers_that_wait_for_their_turn_are_fetched_after_a_reload(scene: Scene) -> None:
    app = scene.upstream.add("app", image("app", layers=12), tag="v1")
    scene.upstream.fault("/blobs/", Fault(stall_after=0))
    server = scene.start(background_fills=2)
    assert scene.manifest("v1").status == 200
    server.wait_for(lambda: scene.upstream.count("/blobs/") == 2, "two fills begun")
    server.reload()
    server.wait_for_log("configuration reloaded")
    scene.upstream.heal()
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_what_a_request_of_before_a_reload_leads_to_is_fetched(scene: Scene) -> None:
    """Its manifest comes after the reload; the layers follow all the same."""
    app = scene.upstream.add("app", image("app", layers=3), tag="v1")
    scene.upstream.fault("/manifests/", Fault(delay=30))
    server = scene.start()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(scene.manifest, "v1")
        server.wait_for(lambda: scene.upstream.count("/manifests/v1") == 1, "asked")
        server.reload()
        server.wait_for_log("configuration reloaded")
        scene.upstream.heal()
        assert asking.result(20).status == 200
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_downloads_of_before_a_reload_end_when_its_grace_is_over(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    server = scene.start(serve={"reload_grace": "1s"})
    with scene.open(blob) as response:
        response.read(1)
        server.reload()
        server.wait_for_log("reload grace is over")
        with pytest.raises(Exception, match=r"IncompleteRead|reset"):
            response.read()
    # What had come is kept, and the new configuration goes on from there.
    scene.upstream.heal()
    assert scene.get(blob).body == blob.data
