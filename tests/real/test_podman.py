"""podman by path prefix: it unpacks what it pulls, so a wrong layer would not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.images import Image
from tests.parts.clients import Podman
from tests.parts.registry import Registry
from tests.parts.tools import require_root
from tests.real.conftest import TAG
from tests.server import Mirror

NAME = "registry.example"


@pytest.mark.parametrize(
    ("repository", "file"),
    [
        ("team/oci.index", "data/oci-0"),
        ("team/docker-list", "data/docker-0"),
        ("docker-image", "data/single-0"),
    ],
)
def test_pull_with_the_upstream_running_and_stopped(
    repository: str,
    file: str,
    registry: Registry,
    mirror: Callable[..., Mirror],
    podman: Podman,
    held: dict[str, Image],
) -> None:
    require_root()
    server = mirror({"upstreams": [{"name": NAME, "endpoint": registry.url}]})
    reference = f"{server.registry}/{NAME}/{repository}:{TAG}"
    for _ in ("running", "stopped"):
        assert podman.pull(reference) == held[repository].digest
        assert file in podman.files(reference)
        podman.remove(reference)
        registry.stop()
