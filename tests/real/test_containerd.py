"""A node's containerd, told by one `_default/hosts.toml` that ociproxy mirrors everything."""

from __future__ import annotations

from collections.abc import Callable

from tests.images import Image, runnable
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool
from tests.real.conftest import TAG
from tests.server import Mirror, upstream_entry

MirrorFactory = Callable[..., Mirror]


def pull_all(node: Containerd, registry: Registry, held: dict[str, Image]) -> None:
    for repository, each in held.items():
        digest = node.pull(f"{registry.name}/{repository}:{TAG}", all_platforms=True)
        assert digest == each.digest
        assert node.holds(each)


def test_every_pull_after_the_first_needs_no_upstream(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    containerd.use_mirror(server.url)
    pull_all(containerd, registry, held)
    # containerd would have gone to the upstream itself, had the mirror failed it.
    assert "containerd/" not in registry.log()

    registry.stop()
    containerd.wipe()
    pull_all(containerd, registry, held)

    server.kill()
    server.start()
    containerd.wipe()
    pull_all(containerd, registry, held)

    server.restart(args=["--offline"])
    with Containerd() as other_node:
        other_node.use_mirror(server.url)
        pull_all(other_node, registry, held)


def test_one_platform_is_pulled_again_without_the_upstream(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    """What nodes do: of the other platforms nothing was ever asked for."""
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    containerd.use_mirror(server.url)
    for _ in ("upstream running", "upstream stopped"):
        for repository, each in held.items():
            digest = containerd.pull(f"{registry.name}/{repository}:{TAG}")
            assert digest == each.digest
        registry.stop()
        containerd.wipe()


def test_an_expired_tag_is_pulled_while_the_upstream_is_down(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    server = mirror(
        {"upstreams": [upstream_entry(registry.url)], "tags": [{"match": "*", "ttl": "0"}]}
    )
    containerd.use_mirror(server.url)
    pull_all(containerd, registry, held)
    registry.stop()
    containerd.wipe()
    pull_all(containerd, registry, held)


def test_a_moved_tag_is_seen(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    server = mirror(
        {"upstreams": [upstream_entry(registry.url)], "tags": [{"match": "*", "ttl": "0"}]}
    )
    containerd.use_mirror(server.url)
    before, after = held["a/b/c/d/e/oci-image"], held["team/oci.index"]
    reference = f"{registry.name}/moving:latest"
    for each in (before, after):
        registry.push("moving", each, tag="latest")
        assert containerd.pull(reference) == each.digest


def test_pull_by_digest(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    containerd.use_mirror(server.url)
    for repository, each in held.items():
        reference = f"{registry.name}/{repository}@{each.digest}"
        assert containerd.pull(reference) == each.digest
    assert "containerd/" not in registry.log()


def test_a_container_starts_from_an_image_pulled_offline(
    registry: Registry, containerd: Containerd, mirror: MirrorFactory
) -> None:
    require_tool("runc")
    require_tool("busybox")
    registry.push("busybox", runnable(), tag="latest")
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    containerd.use_mirror(server.url)
    reference = f"{registry.name}/busybox:latest"
    containerd.pull(reference)
    registry.stop()
    containerd.wipe()
    containerd.pull(reference)
    assert containerd.run(reference) == b"hello from ociproxy\n"
