"""The container images are built from a base that our own mirror serves, and run."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import OCI_LAYER, Image, Layer, content, image_of, multi_platform
from tests.parts.builder import Builder
from tests.parts.registry import Registry
from tests.parts.tools import require_root, require_tool, run
from tests.real.conftest import TAG
from tests.server import LISTENING, Mirror, upstream_entry
from tests.test_wheel import CHECKOUT, SOURCES, run_pip

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]

# A reference's path cannot hold the colon of 127.0.0.1:5000, so the upstream gets a name.
NAME = "registry.example"
NO_NETWORK = re.compile("Could not (resolve|connect)|Unable to connect|Temporary failure")
FAST = "--dpkgopt=force-unsafe-io"
UNNEEDED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/i18n",
    "usr/share/info",
)


def free_port() -> int:
    """The health check asks the port that the environment names, so it cannot be 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Debian with Python, in one layer."""
    require_root()
    require_tool("buildah")
    program = require_tool("mmdebstrap")
    tar = tmp_path_factory.mktemp("base") / "base.tar"
    leave_out = [f"--dpkgopt=path-exclude=/{path}/*" for path in UNNEEDED]
    packages = "--include=ca-certificates,python3,python3-venv"
    command: list[str | Path] = [
        program,
        "--quiet",
        "--variant=apt",
        FAST,
        packages,
        *leave_out,
        "bookworm",
        tar,
    ]
    done = run(*command, limit=300, check=False)
    said = done.stderr.decode(errors="replace")
    if done.returncode != 0 and NO_NETWORK.search(said) and not os.environ.get("CI"):
        pytest.skip("no Debian mirror can be reached")
    assert done.returncode == 0, said
    plain = tar.read_bytes()
    tar.unlink()
    packed = content(gzip.compress(plain, compresslevel=1, mtime=0), OCI_LAYER)
    return image_of([Layer(packed, "sha256:" + hashlib.sha256(plain).hexdigest())])


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build context as a checkout has it after `pip wheel --wheel-dir dist .`"""
    folder = tmp_path_factory.mktemp("context")
    for name in (*SOURCES, "tools"):
        path = CHECKOUT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / name, ignore=ignore)
        elif path.exists():
            shutil.copy(path, folder)
    run_pip(sys.executable, "wheel", "--wheel-dir", folder / "dist", folder)
    return folder


@pytest.fixture
def builder() -> Iterator[Builder]:
    with Builder() as made:
        yield made


def wait_for_port(builder: Builder, name: str) -> int:
    end = time.monotonic() + 30
    while (found := LISTENING.search(builder.logs(name))) is None:
        assert time.monotonic() < end, builder.logs(name)
        time.sleep(0.1)
    return int(found[1])


def test_images_are_built_through_a_mirror_and_run(
    base: Image,
    context: Path,
    builder: Builder,
    mirror: Callable[..., Mirror],
    tmp_path: Path,
) -> None:
    held = multi_platform("held", docker=True)
    with Registry(tmp_path / "registry") as registry:
        registry.push("debian/python", base, tag="bookworm")
        registry.push("team/app", held, tag=TAG)
        server = mirror({"upstreams": [{"name": NAME, "endpoint": registry.url}]})
        builder.build(
            context,
            context / "tools/Dockerfile",
            "ociproxy",
            BASE=f"{server.registry}/{NAME}/debian/python:bookworm",
            PIP_OPTIONS="--no-index",
        )
        assert (server.store / "blobs" / base.layers[0].encoded).exists()
        builder.build(
            context,
            context / "tools/Dockerfile.with-skopeo",
            "ociproxy:with-skopeo",
            BASE="localhost/ociproxy",
        )

        for tag, backend in (("latest", "oras"), ("with-skopeo", "skopeo")):
            name = f"mirror-{backend}"
            config = Mirror(tmp_path / name, [upstream_entry(registry.url, backend=backend)])
            config.config_path.chmod(0o644)
            builder.start(
                f"localhost/ociproxy:{tag}",
                name,
                "--read-only",
                "--cap-drop=ALL",
                f"--env=OCIPROXY_PORT={free_port()}",
                f"--volume={config.config_path}:/etc/ociproxy.yaml:ro",
                arguments=("serve", "--host=127.0.0.1", "--config-path=/etc/ociproxy.yaml"),
            )
            config.port = wait_for_port(builder, name)
            builder.podman("healthcheck", "run", name)
            user = builder.podman("exec", name, "id", "-u")
            assert user == "65532"
            top = config.manifest(registry.name, "team/app", TAG)
            assert (top.status, top.body) == (200, held.top.data), builder.logs(name)
            for each in (*held.manifests, *held.blobs):
                kind = "manifests" if each in held.manifests else "blobs"
                got = config.get(f"/v2/team/app/{kind}/{each.digest}?ns={registry.name}")
                assert (got.status, got.body) == (200, each.data), builder.logs(name)
            builder.podman("stop", name)
            assert builder.podman("inspect", "--format={{.State.ExitCode}}", name) == "0"
            assert "Traceback" not in builder.logs(name)
