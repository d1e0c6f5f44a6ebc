"""skopeo, which knows nothing of `?ns=`: the registry is the first part of the path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import Image
from tests.parts.clients import Skopeo
from tests.parts.registry import Registry
from tests.real.conftest import TAG
from tests.server import Mirror

# A reference's path cannot hold the colon of 127.0.0.1:5000, so the upstream gets a name.
NAME = "registry.example"


@pytest.fixture
def server(registry: Registry, mirror: Callable[..., Mirror]) -> Mirror:
    return mirror({"upstreams": [{"name": NAME, "endpoint": registry.url}]})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_inspect_raw_gives_the_upstreams_bytes(
    server: Mirror, skopeo: Skopeo, held: dict[str, Image]
) -> None:
    for repository, each in held.items():
        reference = f"{server.registry}/{NAME}/{repository}:{TAG}"
        assert skopeo.raw_manifest(reference) == each.top.data


def test_copy_preserves_every_digest_with_the_upstream_running_and_stopped(
    server: Mirror, skopeo: Skopeo, registry: Registry, held: dict[str, Image], tmp_path: Path
) -> None:
    for turn in ("running", "stopped"):
        for repository, each in held.items():
            target = tmp_path / turn / repository
            target.parent.mkdir(parents=True, exist_ok=True)
            reference = f"{server.registry}/{NAME}/{repository}:{TAG}"
            skopeo.copy(reference, target, everything=True)
            copied = files(target)
            assert copied["manifest.json"] == each.top.data
            for child in each.manifests:
                assert copied[f"{child.encoded}.manifest.json"] == child.data
            for blob in each.blobs:
                assert copied[blob.encoded] == blob.data
        registry.stop()


def test_copy_of_one_platform(
    server: Mirror, skopeo: Skopeo, held: dict[str, Image], tmp_path: Path
) -> None:
    each = held["team/docker-list"]
    skopeo.copy(f"{server.registry}/{NAME}/team/docker-list:{TAG}", tmp_path / "copy")
    copied = files(tmp_path / "copy")
    assert copied["manifest.json"] == each.manifests[0].data
    for described in json.loads(each.manifests[0].data)["layers"]:
        assert described["digest"].removeprefix("sha256:") in copied


def test_list_tags(
    server: Mirror, skopeo: Skopeo, registry: Registry, held: dict[str, Image]
) -> None:
    repository, each = next(iter(held.items()))
    registry.push(repository, each, tag="another")
    tags = skopeo.list_tags(f"{server.registry}/{NAME}/{repository}")
    assert sorted(tags) == [TAG, "another"]
