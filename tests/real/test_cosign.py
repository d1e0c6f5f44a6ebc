"""cosign: what it signed is verified through the mirror, and offline; what it saves is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import Image, multi_platform
from tests.parts.registry import Registry
from tests.parts.tools import require_tool, run
from tests.server import Mirror

UPSTREAM = "registry.example"
ROOT_TYPE = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
IN_TAGS, AMONG_REFERRERS = "team/tags", "team/referrers"
SIGN = ("--yes", "--key=cosign.key", "--tlog-upload=false")
VERIFY = ("--key=cosign.pub", "--insecure-ignore-tlog")
"""A pair of keys made offline, and no transparency log."""
ATTEST = ("--type=custom", "--predicate=predicate.json")
BUNDLE = ("--new-bundle-format", "--trusted-root=root.json")
"""An attestation as version 3 writes them; without a root cosign would ask the network for one."""


class Cosign:
    """The program, with a home folder and a pair of keys of its own."""

    def __init__(self, home: Path) -> None:
        self._program, self._home = require_tool("cosign"), home
        # Referrers are an experiment of version 2.
        self._env = {
            "HOME": str(home),
            "DOCKER_CONFIG": str(home),
            "COSIGN_PASSWORD": "",
            "COSIGN_EXPERIMENTAL": "1",
        }
        if b"--use-signing-config" in self.run("sign", "--help"):
            pytest.skip("needs cosign 2: version 3 takes other options")
        self.run("generate-key-pair")
        (home / "predicate.json").write_text('{"built": "here"}', encoding="utf-8")
        (home / "root.json").write_text(json.dumps({"mediaType": ROOT_TYPE}), encoding="utf-8")

    def run(self, *words: str | Path) -> bytes:
        return run(self._program, *words, env=self._env, cwd=self._home).stdout

    def verified(self, image: str, *options: str) -> list[str]:
        """The digests that the valid signatures of an image are of."""
        said = json.loads(self.run("verify", *VERIFY, *options, image))
        return [each["critical"]["image"]["docker-manifest-digest"] for each in said]

    def attested(self, image: str, *options: str) -> int:
        """How many valid attestations an image has."""
        said = self.run("verify-attestation", *VERIFY, "--type=custom", *options, image)
        return len(said.splitlines())


@pytest.fixture(scope="module")
def cosign(tmp_path_factory: pytest.TempPathFactory) -> Cosign:
    return Cosign(tmp_path_factory.mktemp("cosign"))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as started:
        yield started


@pytest.fixture(scope="module")
def held() -> Image:
    return multi_platform("app", layers=2)


def ociproxy(*words: str | Path) -> bytes:
    return run(sys.executable, "-m", "ociproxy", *words).stdout


def test_what_cosign_signed_is_verified_through_the_mirror_without_the_upstream_and_offline(
    cosign: Cosign, registry: Registry, held: Image, mirror: Callable[..., Mirror]
) -> None:
    for repository in (IN_TAGS, AMONG_REFERRERS):
        registry.push(repository, held, tag="v1")
    signed = f"{registry.name}/{IN_TAGS}@{held.digest}"
    cosign.run("sign", *SIGN, signed)
    cosign.run("attest", *SIGN, *ATTEST, signed)
    signed = f"{registry.name}/{AMONG_REFERRERS}@{held.digest}"
    cosign.run("sign", *SIGN, "--registry-referrers-mode=oci-1-1", signed)
    cosign.run("attest", *SIGN, *ATTEST, "--new-bundle-format", signed)
    server = mirror({"upstreams": [{"name": UPSTREAM, "endpoint": registry.url}]})

    def look() -> bytes:
        """The signature, after all that cosign shows and verifies."""
        image = f"{server.registry}/{UPSTREAM}/{IN_TAGS}:v1"
        other = f"{server.registry}/{UPSTREAM}/{AMONG_REFERRERS}:v1"
        assert cosign.verified(image) == [held.digest]
        assert cosign.verified(other, "--experimental-oci11") == [held.digest]
        assert cosign.attested(image) == 1
        assert cosign.attested(other, *BUNDLE) == 1
        tree = cosign.run("tree", image).decode()
        assert f"{IN_TAGS}:sha256-{held.top.encoded}.sig" in tree
        assert f"{IN_TAGS}:sha256-{held.top.encoded}.att" in tree
        return cosign.run("download", "signature", image)

    online = look()
    registry.stop()
    assert look() == online
    server.restart(args=["--offline"])
    assert look() == online


def test_what_cosign_saves_through_the_mirror_is_imported_with_its_signature(
    cosign: Cosign, registry: Registry, held: Image, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    registry.push(IN_TAGS, held, tag="v1")
    cosign.run("sign", *SIGN, f"{registry.name}/{IN_TAGS}@{held.digest}")
    server = mirror({"upstreams": [{"name": UPSTREAM, "endpoint": registry.url}]})
    saved, store, name = tmp_path / "saved", tmp_path / "store", f"{UPSTREAM}/{IN_TAGS}"
    cosign.run("save", "--dir", saved, f"{server.registry}/{name}:v1")
    ociproxy("import", saved, "--image-path", store, "--name", f"{name}:v1")
    listed = json.loads(ociproxy("list", "--image-path", store, "--format", "json"))
    assert {each["reference"]: each["complete"] for each in listed} == {
        f"{name}:v1": True,
        f"{name}:sha256-{held.top.encoded}.sig": True,
    }
    server = mirror(None, store=store, args=["--offline"])
    assert cosign.verified(f"{server.registry}/{name}:v1") == [held.digest]
