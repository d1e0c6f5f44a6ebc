"""Large documents, and clients that do not read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.images import image
from tests.serve.scene import MIB, Scene
from tests.serve.wire import Wire

CLIENTS = 60


def ask_for_manifest(scene: Scene) -> str:
    made = scene.upstream.add(scene.repository, image("app", pad_to=39 * MIB // 10))
    return scene.path("manifests", made.digest)


def ask_for_tags(scene: Scene) -> str:
    made = image("app")
    for number in range(30_000):
        scene.upstream.add(scene.repository, made, tag=f"{number:0120}")
    return scene.path("tags", "list")


@pytest.mark.parametrize("prepare", [ask_for_manifest, ask_for_tags])
def test_clients_that_read_nothing_of_a_large_document_fill_no_memory(
    scene: Scene, prepare: Callable[[Scene], str]
) -> None:
    path = prepare(scene)
    server = scene.start()
    whole = server.get(path)
    assert whole.status == 200
    assert len(whole.body) > 3 * MIB
    before = server.peak_rss()
    wires = [Wire(server, receive_buffer=4096) for _ in range(CLIENTS)]
    try:
        for wire in wires:
            assert b" 200 OK" in wire.ask(path)
        assert server.get("/healthz").status == 200
        # A copy for each client would take three times as much.
        assert server.peak_rss() - before < CLIENTS * len(whole.body) // 3
    finally:
        for wire in wires:
            wire.socket.close()
    assert server.get(path).body == whole.body
