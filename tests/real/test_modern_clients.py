"""crane, oras and regctl of today: what they pull, what they write, what they read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests.images import Image, image, multi_platform
from tests.parts.registry import Registry
from tests.parts.tools import go_install, run
from tests.server import ROOT, Mirror
from tests.stores import put

pytestmark = [pytest.mark.network, pytest.mark.timeout(660)]

PACKAGES = {
    "crane": "github.com/google/go-containerregistry/cmd/crane@v0.22.1",
    "oras": "oras.land/oras/cmd/oras@v1.3.6",
    "regctl": "github.com/regclient/regclient/cmd/regctl@v0.11.7",
}
UPSTREAM = "registry.example"


@dataclass(frozen=True, slots=True)
class Client:
    """One of the programs, with a home folder of its own."""

    name: str
    program: Path
    home: Path

    def run(self, *words: str | Path) -> bytes:
        return run(self.program, *words, env=self.env).stdout

    @property
    def env(self) -> Mapping[str, str]:
        return {"HOME": str(self.home), "DOCKER_CONFIG": str(self.home)}

    def trust(self, registry: str) -> None:
        """Use plain HTTP for it; the others are told with each command."""
        if self.name == "regctl":
            self.run("registry", "set", "--tls", "disabled", registry)

    def pull(self, reference: str, folder: Path) -> None:
        """The image with all its platforms, into an OCI layout."""
        if self.name == "crane":
            self.run("pull", "--insecure", "--format", "oci", reference, folder)
        elif self.name == "oras":
            source = ["--from-plain-http", reference]
            self.run("copy", *source, "--to-oci-layout", f"{folder}:v1")
        else:
            self.run("image", "copy", reference, f"ocidir://{folder}:v1")


@pytest.fixture(scope="session", params=PACKAGES)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    return Client(name, go_install(PACKAGES[name], folder), folder)


@pytest.fixture
def target(tmp_path: Path, client: Client) -> Iterator[Registry]:
    """An empty registry."""
    with Registry(tmp_path / "registry") as registry:
        client.trust(registry.name)
        yield registry


def holds(layout: Path, held: Image) -> bool:
    """Whether an OCI layout names this image, and has each of its bytes."""
    index = json.loads((layout / "index.json").read_text(encoding="utf-8"))
    blobs = layout / "blobs" / "sha256"
    named = held.digest in [each["digest"] for each in index["manifests"]]
    return named and all((blobs / c.encoded).read_bytes() == c.data for c in held.all_content())


def ociproxy(*words: str | Path) -> bytes:
    return run(sys.executable, "-m", "ociproxy", *words).stdout


def test_an_image_is_pulled_cold_warm_and_offline(
    client: Client, target: Registry, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    held = target.push("team/app", multi_platform("app", layers=2), tag="v1")
    server = mirror({"upstreams": [{"name": UPSTREAM, "endpoint": target.url}]})
    client.trust(server.registry)
    reference = f"{server.registry}/{UPSTREAM}/team/app:v1"
    client.pull(reference, tmp_path / "cold")
    fetched = target.log().count("GET /v2/team/app/blobs/")
    client.pull(reference, tmp_path / "warm")
    assert target.log().count("GET /v2/team/app/blobs/") == fetched == len(held.blobs)
    target.stop()
    server.restart(args=["--offline"])
    client.pull(reference, tmp_path / "offline")
    for each in ("cold", "warm", "offline"):
        assert holds(tmp_path / each, held)


def test_what_it_writes_is_imported(client: Client, target: Registry, tmp_path: Path) -> None:
    held = target.push("team/app", multi_platform("app", layers=2), tag="v1")
    source, store = f"{target.name}/team/app:v1", tmp_path / "store"
    written = tmp_path / "written"
    name = f"{UPSTREAM}/team/app:v1"
    if client.name == "regctl":
        client.run("image", "export", source, written)
        name = source  # regctl writes the image's name, too
    else:
        client.pull(source, written)
    ociproxy("import", written, "--image-path", store, "--name", name)
    [listed] = json.loads(ociproxy("list", "--image-path", store, "--format", "json"))
    assert (listed["reference"], listed["digest"]) == (name, held.digest)
    assert listed["complete"] is True


def test_what_we_write_is_read(client: Client, target: Registry, tmp_path: Path) -> None:
    held, store = multi_platform("app", layers=2), Store(tmp_path / "store")
    archive, layout = tmp_path / "a.tar", tmp_path / "layout"
    put(store, f"{UPSTREAM}/team/app:1.0", held)
    ociproxy("export", archive, "--image-path", store.root)
    layout.mkdir()
    run("tar", "--extract", "--file", archive, "--directory", layout)
    there = f"{target.name}/pushed/app:1.0"
    if client.name == "crane":
        client.run("push", "--insecure", layout, there)
    elif client.name == "oras":
        named = f"{archive}@{held.digest}"
        client.run("copy", "--from-oci-layout", named, "--to-plain-http", there)
    else:
        client.run("image", "import", there, archive)
    client.pull(there, tmp_path / "back")
    assert holds(tmp_path / "back", held)


@pytest.mark.parametrize("client", ["regctl"], indirect=True)
def test_regctl_pushes_an_archive_into_a_registry_as_documented(
    client: Client, target: Registry, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "airgap.md").read_text(encoding="utf-8")
    section = text.partition("## Push into another registry")[2]
    script = section.split("```sh\n")[2].partition("```")[0]
    assert "regctl" in script
    store = Store(tmp_path / "store")
    made = {"team/one:1": image("one"), "team/multi:2": multi_platform("multi")}
    for name, each in made.items():
        put(store, f"{UPSTREAM}/{name}", each)
    script = script.replace("registry.internal", target.name)
    script = script.replace("ociproxy ", f"{sys.executable} -m ociproxy ")
    script = script.replace("regctl ", f"{client.program} ")
    env = {**client.env, "OCIPROXY_IMAGE_PATH": str(store.root), "PYTHONPATH": str(ROOT)}
    run("sh", "-ec", f"cd {tmp_path}\n{script}", env=env)
    for name, each in made.items():
        client.pull(f"{target.name}/{name}", tmp_path / each.top.encoded)
        assert holds(tmp_path / each.top.encoded, each)
