"""A mirror that fetches by skopeo, between containerd and docker-registry."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.images import (
    Image,
    image_of,
    layer,
    random_bytes,
)
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool
from tests.real.conftest import TAG
from tests.server import Mirror, upstream_entry

pytestmark = pytest.mark.usefixtures("_needs_skopeo")


@pytest.fixture
def _needs_skopeo() -> None:
    require_tool("skopeo")


def by_skopeo(registry: Registry, **more: object) -> dict[str, object]:
    return upstream_entry(registry.url, backend="skopeo", **more)


def blob_gets(registry: Registry, digest: str) -> int:
    return len(re.findall(rf'"GET /v2/\S+/blobs/{digest} HTTP/1.1" 200', registry.log()))


@pytest.mark.parametrize("running", [True, False])
def test_containerd_pulls_every_kind_of_image(
    registry: Registry,
    held: dict[str, Image],
    mirror: Callable[..., Mirror],
    containerd: Containerd,
    running: bool,
) -> None:
    server = mirror({"upstreams": [by_skopeo(registry)]})
    containerd.use_mirror(server.url)
    for repository, each in held.items():
        reference = f"{registry.name}/{repository}:{TAG}"
        assert containerd.pull(reference, all_platforms=True) == each.digest
        assert containerd.holds(each)
    if not running:
        registry.stop()
        containerd.wipe()
        for repository, each in held.items():
            reference = f"{registry.name}/{repository}:{TAG}"
            assert containerd.pull(reference, all_platforms=True) == each.digest
            assert containerd.holds(each)
    assert "Traceback" not in server.log()


def test_a_shared_layer_is_fetched_once(tmp_path: Path, mirror: Callable[..., Mirror]) -> None:
    """Eight images at once, of two layers that all have and one of their own."""
    shared = [layer({f"shared-{n}": random_bytes(2_000_000, seed=n)}) for n in range(2)]
    images = [
        image_of([*shared, layer({f"own-{n}": random_bytes(10_000, seed=n)})]) for n in range(8)
    ]
    with Registry(tmp_path / "registry") as registry:
        for n, each in enumerate(images):
            registry.push(f"team/app-{n}", each, tag=TAG)
        server = mirror({"upstreams": [by_skopeo(registry)]})

        def pull(n: int) -> None:
            answer = server.manifest(registry.name, f"team/app-{n}", TAG)
            assert answer.body == images[n].top.data
            for blob in images[n].blobs:
                assert server.blob(registry.name, f"team/app-{n}", blob.digest).body == blob.data

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pull, range(8)))
        for one in shared:
            assert blob_gets(registry, one.content.digest) == 1
        # What is stored is not fetched with another image either.
        registry.push("team/more", image_of([shared[0], layer({"more": b"more"})]), tag=TAG)
        more = server.manifest(registry.name, "team/more", TAG).json()
        for described in (more["config"], *more["layers"]):
            server.blob(registry.name, "team/more", described["digest"])
        assert blob_gets(registry, shared[0].content.digest) == 1
        assert list((server.store / "pulls").glob("skopeo-*")) != []
        server.stop()
        assert [p for p in (server.store / "pulls").iterdir()] == []
