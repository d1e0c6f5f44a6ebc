"""Documents that are no images and still consist of blobs: load, list, export, import, a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests.archive.importing import Import
from tests.archive.test_bundle import serving
from tests.images import (
    DOCKER_LAYER,
    OCI_INDEX,
    OCI_LAYER,
    Content,
    Image,
    content,
    image,
    index,
    random_bytes,
)
from tests.load.loading import Load
from tests.server import Mirror, upstream_entry
from tests.stores import stored
from tests.upstream import FakeUpstream

LAYERS = tuple(content(random_bytes(2000, seed=each), each) for each in (OCI_LAYER, DOCKER_LAYER))


def document(media_type: str, **fields: object) -> Content:
    made = {"schemaVersion": 2, "mediaType": media_type, **fields}
    return content(json.dumps(made).encode(), media_type)


def buildkit_cache() -> Image:
    """As `docker buildx build --cache-to type=registry` pushes it without `image-manifest=true`."""
    config = content(b'{"layers": []}', "application/vnd.buildkit.cacheconfig.v0")
    entries = [each.descriptor() for each in (*LAYERS, config)]
    return Image(document(OCI_INDEX, manifests=entries), blobs=(*LAYERS, config))


def artifact_manifest(media_type: str) -> Image:
    entries = [each.descriptor() for each in LAYERS]
    made = document(media_type, artifactType="application/x.thing", blobs=entries)
    return Image(made, blobs=LAYERS)


ODD = {
    "BuildKit's cache": buildkit_cache(),
    "OCI artifact": artifact_manifest("application/vnd.oci.artifact.manifest.v1+json"),
    "ORAS artifact": artifact_manifest("application/vnd.cncf.oras.artifact.manifest.v1+json"),
}


def export(store: Path, archive: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ociproxy", "export", "--image-path", str(store), str(archive)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", ODD)
def test_its_blobs_count_from_the_registry_to_the_last_reader(
    upstream: FakeUpstream, load: Load, tmp_path: Path, kind: str
) -> None:
    made = upstream.add("team/odd", ODD[kind], tag="v1")
    name = f"{upstream.registry}/team/odd:v1"
    done = load.run(load.write(name))
    assert done.code == 0, done.stderr
    assert load.has(made)
    assert load.complete() == {name}
    archive = tmp_path / "odd.tar"
    exported = export(load.store, archive)
    assert exported.returncode == 0, exported.stderr
    job = Import(tmp_path / "import")
    assert job.run(archive).statuses == {name: "imported"}
    job.check(name, made)
    assert job.listed() == {name: True}
    with serving(tmp_path, archive) as mirror:
        assert mirror.manifest(upstream.registry, "team/odd", "v1").body == made.top.data
        for blob in made.blobs:
            assert mirror.blob(upstream.registry, "team/odd", blob.digest).body == blob.data
    stored(Store(load.store), made.blobs[1]).unlink()
    assert load.complete() == set()
    exported = export(load.store, archive)
    assert exported.returncode == 3
    assert made.blobs[1].digest in exported.stderr.decode()


@pytest.mark.parametrize("kind", ["OCI artifact", "ORAS artifact"])
def test_a_client_that_pulls_an_artifact_has_its_blobs_fetched(
    upstream: FakeUpstream, tmp_path: Path, kind: str
) -> None:
    made = upstream.add("team/odd", ODD[kind], tag="v1")
    server = Mirror(tmp_path / "server", {"upstreams": [upstream_entry(upstream.url)]})
    server.start()
    try:
        assert server.manifest(upstream.registry, "team/odd", "v1").body == made.top.data
        for blob in made.blobs:
            server.wait_for_file(f"blobs/{blob.encoded}")
    finally:
        server.kill()


def test_an_index_of_images_and_blobs_has_both(upstream: FakeUpstream, load: Load) -> None:
    app = image("app")
    entries = [*index({"linux/amd64": app}).top.json()["manifests"], LAYERS[0].descriptor()]
    mixed = Image(document(OCI_INDEX, manifests=entries), (app.top,), (*app.blobs, LAYERS[0]))
    made = upstream.add("team/mixed", mixed, tag="v1")
    name = f"{upstream.registry}/team/mixed:v1"
    assert load.run(load.write(name), "--platform", "linux/amd64").code == 0
    assert load.has(made)
    assert load.complete() == {name}
    stored(Store(load.store), LAYERS[0]).unlink()
    assert load.complete() == set()
