"""`load` from a real registry, by either backend, and containerd that pulls it without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import Image
from tests.load.loading import Load
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool
from tests.real.conftest import TAG
from tests.server import Mirror


@pytest.mark.parametrize("backend", ["oras", "skopeo"])
def test_whole_images_with_their_digests(
    tmp_path: Path, registry: Registry, held: dict[str, Image], backend: str
) -> None:
    if backend == "skopeo":
        require_tool("skopeo")
    load = Load(tmp_path / "load", registry.url)
    names = {f"{registry.name}/{repository}:{TAG}": each for repository, each in held.items()}
    listed = load.write(*names)
    done = load.run(listed, "--all-platforms", "--backend", backend)
    assert done.code == 0, done.stderr
    assert load.complete() == set(names)
    for name, each in names.items():
        assert load.tag(name) == each.digest
        assert load.has(each)


def test_containerd_pulls_what_was_loaded_after_the_registry_is_gone(
    tmp_path: Path,
    registry: Registry,
    held: dict[str, Image],
    containerd: Containerd,
    mirror: Callable[..., Mirror],
) -> None:
    load = Load(tmp_path / "load", registry.url)
    names = {f"{registry.name}/{repository}:{TAG}": each for repository, each in held.items()}
    done = load.run(load.write(*names), "--arch", "amd64")
    assert done.code == 0, done.stderr
    registry.stop()
    server = mirror(args=["--offline"], store=load.store)
    containerd.use_mirror(server.url)
    for name, each in names.items():
        assert containerd.pull(name) == each.digest
