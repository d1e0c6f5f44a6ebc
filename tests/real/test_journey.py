"""The air gap from end to end: a registry, a laptop, a file, a network without one, a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.images import Image, image, multi_platform, runnable
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import run
from tests.server import PROGRAM, Mirror


def twenty_images() -> dict[str, Image]:
    """By repository: every kind, some with layers in common, one that runs."""
    images = {f"team/index-{n}": multi_platform(f"index {n}") for n in range(6)}
    images |= {f"team/list-{n}": multi_platform(f"list {n}", docker=True) for n in range(4)}
    images |= {f"single/oci-{n}": image(f"oci {n}", layers=2) for n in range(5)}
    images |= {f"single/docker-{n}": image(f"docker {n}", docker=True) for n in range(3)}
    images["copy/of-oci-0"] = images["single/oci-0"]
    images["team/program"] = runnable()
    return images


def ociproxy(*words: str | Path) -> bytes:
    return run(PROGRAM, *words).stdout


def test_twenty_images_cross_the_gap(
    tmp_path: Path, containerd: Containerd, mirror: Callable[..., Mirror]
) -> None:
    images = twenty_images()
    assert len(images) == 20
    with Registry(tmp_path / "registry") as registry:
        for repository, each in images.items():
            registry.push(repository, each, tag="1.0")
        names = {f"{registry.name}/{repository}:1.0": each for repository, each in images.items()}
        listed, config = tmp_path / "images.txt", tmp_path / "config.yaml"
        listed.write_text("# all of them\n" + "\n".join(names) + "\n", encoding="utf-8")
        config.write_text(
            f'upstreams: [{{name: "{registry.name}", scheme: http}}]\n', encoding="utf-8"
        )
        laptop, archive = tmp_path / "laptop", tmp_path / "images.tar"
        options: list[str | Path] = ["--image-path", laptop, "--config-path", config]
        ociproxy("load", "--arch", "amd64", "--os", "linux", *options, listed)
    ociproxy("export", archive, "--image-path", laptop)

    inside = tmp_path / "inside"
    ociproxy("import", archive, "--image-path", inside)
    assert ociproxy("diff", archive, inside) == b"no difference\n"
    server = mirror(store=inside)  # which would ask an upstream, were there one
    containerd.use_mirror(server.url)
    for name, each in names.items():
        assert containerd.pull(name) == each.digest, name
        by_digest = f"{name.removesuffix(':1.0')}@{each.digest}"
        assert containerd.pull(by_digest) == each.digest, name
    program = next(name for name in names if "program" in name)
    assert containerd.run(program) == b"hello from ociproxy\n"
