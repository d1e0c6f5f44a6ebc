"""Clients that leave before they are answered: what they asked for costs nothing from then on."""

from __future__ import annotations

from pathlib import Path

from tests.images import image
from tests.serve.scene import MIB, Scene
from tests.serve.wire import Wire
from tests.upstream_faults import Fault

CLIENTS = 200
CONNECTIONS = 50
ARRIVED = 64 * 1024


def open_files(scene: Scene) -> int:
    process = scene.server.process
    assert process is not None
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def come_and_go(scene: Scene, path: str, *, heard: int = 0) -> None:
    """Clients in groups; each group leaves when it has read so many bytes."""
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    for _ in range(CLIENTS // 20):
        wires = [Wire(scene.server) for _ in range(20)]
        for wire in wires:
            wire.send(request)
        for wire in wires:
            got = 0
            while got < heard:
                part = wire.read_some()
                assert part
                got += len(part)
            wire.socket.close()


def test_clients_that_left_a_stalled_blob_hold_no_files(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=ARRIVED))
    scene.start(serve={"connections": CONNECTIONS})
    before = open_files(scene)
    come_and_go(scene, scene.path("blobs", blob.digest), heard=ARRIVED)
    scene.server.wait_for(
        lambda: open_files(scene) < before + CONNECTIONS, "files given back", limit=10.0
    )
    assert scene.server.get("/healthz").status == 200
    scene.upstream.heal()
    assert scene.get(blob).body == blob.data
    assert "Traceback" not in scene.server.log()


def test_clients_that_left_a_slow_manifest_wait_no_longer_and_are_logged(scene: Scene) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    scene.upstream.fault("/manifests/", Fault(delay=60))
    scene.start(serve={"connections": CONNECTIONS})
    before = open_files(scene)
    come_and_go(scene, scene.path("manifests", "v1"))
    scene.server.wait_for_log("request abandoned")
    scene.server.wait_for(lambda: open_files(scene) < before + CONNECTIONS // 2, "connections gone")
    assert 'reason="the client left"' in scene.server.log()
    assert "request cut" not in scene.server.log()
    scene.upstream.heal()
    assert scene.manifest("v1").body == app.top.data
    # One request to the upstream for all of them: none was lost with the client that began it.
    assert scene.upstream.count("/manifests/", "GET") <= 2
