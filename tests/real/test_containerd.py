"""A node's containerd, told by one `_default/hosts.toml` that ociproxy mirrors everything."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import Image, image, runnable
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import go_install, require_tool, small_disk
from tests.real.conftest import TAG
from tests.server import Mirror, upstream_entry

MirrorFactory = Callable[..., Mirror]
IMAGE = "a/b/c/d/e/oci-image"


@pytest.fixture(scope="session")
def ctr_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client of containerd 2.4, which asks registries by itself; Debian 12 has 1.6."""
    package = "github.com/containerd/containerd/v2/cmd/ctr@v2.4.2"
    return go_install(package, tmp_path_factory.mktemp("go"))


@pytest.fixture
def dead_mirror() -> Iterator[str]:
    """The URL of a host that answers no packet: neither a connection nor a refusal."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # A full backlog: the kernel drops further handshakes.
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for each in waiting:
            each.close()


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


def test_an_image_larger_than_the_disk_of_the_mirror_is_pulled(
    registry: Registry, containerd: Containerd, mirror: MirrorFactory, tmp_path: Path
) -> None:
    """The disk gets full in the middle of the pull. containerd does not fall back then."""
    large = registry.push("team/large", image("large", layers=3, layer_size=30_000_000), tag="v1")
    with small_disk(tmp_path / "disk", "40m") as disk:
        server = mirror({"upstreams": [upstream_entry(registry.url)]}, store=disk)
        containerd.use_mirror(server.url)
        assert containerd.pull(f"{registry.name}/team/large:v1") == large.digest
        assert containerd.holds(large)
        assert "passing through" in server.log()
        assert "containerd/" not in registry.log()
        server.stop()


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


def test_containerd_1_reads_what_client_config_prints(
    registry: Registry, held: dict[str, Image], containerd: Containerd, mirror: MirrorFactory
) -> None:
    """It ignores `dial_timeout`; for a capability that it does not know it drops the file."""
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    reference = f"{registry.name}/{IMAGE}:{TAG}"
    containerd.use_printed(server.url)
    assert containerd.pull(reference) == held[IMAGE].digest
    assert "containerd/" not in registry.log()

    containerd.wipe()
    containerd.use_printed(server.url, "--referrers")
    containerd.pull(reference)
    assert "containerd/" in registry.log()


@pytest.mark.network
@pytest.mark.timeout(660)
def test_containerd_2_reads_what_client_config_prints(
    registry: Registry,
    held: dict[str, Image],
    containerd: Containerd,
    mirror: MirrorFactory,
    ctr_2: Path,
) -> None:
    server = mirror({"upstreams": [upstream_entry(registry.url)]})
    for options in ((), ("--referrers",)):
        containerd.use_printed(server.url, *options)
        reference = f"{registry.name}/{IMAGE}:{TAG}"
        assert containerd.pull_by_2(ctr_2, reference) == held[IMAGE].digest
        containerd.wipe()
    assert "containerd/" not in registry.log()


@pytest.mark.network
@pytest.mark.timeout(660)
def test_a_dead_mirror_costs_containerd_2_seconds_not_half_a_minute_a_blob(
    registry: Registry,
    held: dict[str, Image],
    containerd: Containerd,
    dead_mirror: str,
    ctr_2: Path,
) -> None:
    containerd.use_printed(dead_mirror)
    began = time.monotonic()
    digest = containerd.pull_by_2(ctr_2, f"{registry.name}/{IMAGE}:{TAG}")
    assert digest == held[IMAGE].digest
    assert time.monotonic() - began < 30
    assert "containerd/" in registry.log()
