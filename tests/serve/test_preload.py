"""`serve --preload-images`: loaded while serving, kept without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.serve import preload
from ociproxy.store import files
from tests.images import image, multi_platform
from tests.load.loading import Load
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "preload.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_images_are_loaded_and_a_restart_needs_no_network(
    tmp_path: Path, upstream: FakeUpstream, mirror: MakeMirror
) -> None:
    app = upstream.add("team/app", multi_platform("app", layers=2), tag="v1")
    names = listed(tmp_path, f"{upstream.registry}/team/app:v1  platform=linux/amd64")
    server = mirror([upstream_entry(upstream.url)], args=["--preload-images", names])
    server.wait_for_log("preloaded")
    assert f"digest={app.digest}" in server.log()
    upstream.stop_listening()
    for args in (["--preload-images", names, "--pull-timeout", "100"], ["--offline"]):
        server.restart(args=["--preload-images", names, *args])
        server.wait_for_log("image kept")
        amd64 = app.manifests[0]
        for digest in ("v1", app.digest, amd64.digest):
            assert server.manifest(upstream.registry, "team/app", digest).status == 200
        for layer in amd64.json()["layers"]:
            assert server.blob(upstream.registry, "team/app", layer["digest"]).status == 200


def test_server_answers_while_it_loads_and_clients_read_along(
    tmp_path: Path, upstream: FakeUpstream, mirror: MakeMirror
) -> None:
    app = upstream.add("team/app", image("app", layer_size=400_000), tag="v1")
    layer = app.layers[0]
    upstream.fault(f"/blobs/{layer.digest}", Fault(rate=400_000))
    names = listed(tmp_path, f"{upstream.registry}/team/app:v1")
    server = mirror([upstream_entry(upstream.url)], args=["--preload-images", names])
    answer = server.blob(upstream.registry, "team/app", layer.digest)
    assert (answer.status, answer.body) == (200, layer.data)
    server.wait_for_log("preloaded")
    assert upstream.bytes_sent(layer.digest) == layer.size


def test_one_worker_loads(tmp_path: Path, upstream: FakeUpstream, mirror: MakeMirror) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    names = listed(tmp_path, f"{upstream.registry}/team/app:v1")
    args = ["--preload-images", names, "--workers", "3"]
    server = mirror([upstream_entry(upstream.url)], args=args)
    server.wait_for_log("preloaded")
    server.stop()
    assert upstream.count("/manifests/v1") == 1


def test_what_is_not_there_is_said_and_the_server_serves(
    tmp_path: Path, upstream: FakeUpstream, mirror: MakeMirror
) -> None:
    names = listed(tmp_path, f"{upstream.registry}/team/gone:v1")
    server = mirror([upstream_entry(upstream.url)], args=["--preload-images", names])
    server.wait_for_log("image not loaded")
    assert server.get("/v2/").status == 200


def test_bad_list_ends_the_start(load: Load, tmp_path: Path, mirror: MakeMirror) -> None:
    names = listed(tmp_path, "ok", "not ok")
    with pytest.raises(AssertionError, match="ended with 2") as failure:
        mirror({}, args=["--preload-images", names])
    assert f"{names}:2: " in str(failure.value)


def test_a_process_that_waits_for_the_claim_looks_so_often_that_each_pause_counts() -> None:
    assert preload._LOOK <= files._BEAT
