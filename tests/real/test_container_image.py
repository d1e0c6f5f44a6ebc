"""The container images are built from a base that our own mirror serves, and run."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from ociproxy import __version__
from tests.images import OCI_LAYER, Image, Layer, content, image_of, multi_platform
from tests.parts.builder import Builder
from tests.parts.registry import Registry
from tests.parts.tools import require_root, require_tool, run
from tests.real.conftest import TAG
from tests.server import LISTENING, Mirror, upstream_entry
from tests.test_wheel import CHECKOUT, SOURCES, run_pip
from tools import chart

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]

# A reference's path cannot hold the colon of 127.0.0.1:5000, so the upstream gets a name.
NAME = "registry.example"
NO_NETWORK = re.compile("Could not (resolve|connect)|Unable to connect|Temporary failure")
FAST = "--dpkgopt=force-unsafe-io"
MOST_PULLED = 120_000_000
"""Bytes of the whole plain image, as it is pulled."""
BASE_PULLED = 45_000_000
"""Of them python:3.13-slim-bookworm, the base of users: it cannot be had here."""
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
    """A build context without a package index: what we build, and all that it depends on."""
    folder = tmp_path_factory.mktemp("context")
    for name in (*SOURCES, "tools"):
        path = CHECKOUT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / name, ignore=ignore)
        elif path.exists():
            shutil.copy(path, folder)
    dist, locked = folder / "dist", folder / "tools/requirements.txt"
    run_pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", dist, folder)
    run_pip(sys.executable, "download", "--no-deps", "--require-hashes", "-r", locked, "-d", dist)
    return folder


@pytest.fixture(scope="module")
def builder(
    base: Image, context: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Builder]:
    """Has both images, made of a base that came through our mirror."""
    folder = tmp_path_factory.mktemp("build")
    with Registry(folder / "registry") as registry, Builder() as made:
        registry.push("debian/python", base, tag="bookworm")
        server = Mirror(
            folder / "mirror", {"upstreams": [{"name": NAME, "endpoint": registry.url}]}
        )
        server.start()
        try:
            made.build(
                context,
                context / "tools/Dockerfile",
                "ociproxy",
                BASE=f"{server.registry}/{NAME}/debian/python:bookworm",
                PIP_OPTIONS="--no-index",
                VERSION=__version__,
            )
        finally:
            server.kill()
        assert (server.store / "blobs" / base.layers[0].encoded).exists()
        made.build(
            context,
            context / "tools/Dockerfile.with-skopeo",
            "ociproxy:with-skopeo",
            BASE="localhost/ociproxy",
        )
        yield made


def wait_for_port(builder: Builder, name: str) -> int:
    end = time.monotonic() + 30
    while (found := LISTENING.search(builder.logs(name))) is None:
        assert time.monotonic() < end, builder.logs(name)
        time.sleep(0.1)
    return int(found[1])


@pytest.mark.parametrize(("tag", "backend"), [("latest", "oras"), ("with-skopeo", "skopeo")])
def test_an_image_that_was_built_through_a_mirror_is_one(
    builder: Builder, tmp_path: Path, tag: str, backend: str
) -> None:
    held = multi_platform("held", docker=True)
    with Registry(tmp_path / "registry") as registry:
        registry.push("team/app", held, tag=TAG)
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


def test_the_plain_image_says_what_it_is_and_has_less_than_120_mb(builder: Builder) -> None:
    (described,) = json.loads(builder.podman("inspect", "--type=image", "localhost/ociproxy"))
    labels = described["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "ociproxy"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    history = json.loads(
        builder.podman("history", "--format=json", "--human=false", "localhost/ociproxy")
    )
    # The first is the base. What is added counts unpacked, which is three times of what is pulled.
    added = sum(int(each["size"]) for each in history[:-1])
    assert BASE_PULLED + added < MOST_PULLED, history


@pytest.mark.parametrize("kind", ["Deployment", "DaemonSet"])
def test_what_the_chart_runs_answers_its_own_probes(
    builder: Builder, tmp_path: Path, kind: str
) -> None:
    """Its command, user, rights, files and read-only root, with the ports of this machine."""
    require_tool("helm")
    port = free_port()
    given = {"kind": kind, "port": port, "config": {"log": {"level": "debug"}}}
    rendered = {each["kind"]: each for each in yaml.safe_load_all(chart.manifests(given)) if each}
    workload, config_map = rendered[kind], rendered["ConfigMap"]
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    files = tmp_path / "config"
    files.mkdir(mode=0o755)
    for file, text in config_map["data"].items():
        (files / file).write_text(text)
    name = f"chart-{kind.lower()}"
    security, rights = pod["securityContext"], container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    sources = {"config": str(files), "store": name, "tmp": f"{name}-tmp"}
    builder.start(
        "localhost/ociproxy:latest",
        name,
        "--read-only",
        "--read-only-tmpfs=false",
        f"--user={security['runAsUser']}:{security['runAsGroup']}",
        *(f"--cap-drop={each}" for each in rights["capabilities"]["drop"]),
        "--security-opt=no-new-privileges",
        *(
            f"--volume={sources[each['name']]}:{each['mountPath']}:"
            + ("ro" if each.get("readOnly") else "U")
            for each in container["volumeMounts"]
        ),
        f"--entrypoint={json.dumps(container['command'])}",
        arguments=tuple(container["args"]),
    )
    assert wait_for_port(builder, name) == port
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        host = asked.get("host", "127.0.0.1")
        with urlopen(f"http://{host}:{ports[asked['port']]}{asked['path']}", timeout=10) as answer:
            assert answer.status == 200
    builder.podman("stop", f"--time={pod['terminationGracePeriodSeconds']}", name)
    assert builder.podman("inspect", "--format={{.State.ExitCode}}", name) == "0"
    assert "Traceback" not in builder.logs(name)
