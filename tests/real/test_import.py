"""Import of what skopeo and podman write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests.archive.importing import Import
from tests.images import Image
from tests.parts.clients import Podman, Skopeo
from tests.parts.registry import Registry
from tests.real.conftest import TAG

NAME = "registry.example/team/app:1"
INDEX, IMAGE = "team/oci.index", "a/b/c/d/e/oci-image"


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path / "job")


def layers_of(job: Import, name: str) -> list[str]:
    """The layers' diff_ids in the config of an image that has one platform."""
    store, reference = Store(job.store), Reference.parse(name)
    assert reference.tag is not None
    record = store.refs.find_tag(reference.repository, reference.tag)
    assert record is not None
    holder = store.manifests.find(record.descriptor.digest)
    assert holder is not None
    digest = Digest.parse(json.loads(holder.raw)["config"]["digest"])
    config = json.loads(store.blobs.path(digest).read_bytes())
    diff_ids: list[str] = config["rootfs"]["diff_ids"]
    return diff_ids


def diff_ids(image: Image) -> list[str]:
    config = next(blob for blob in image.blobs if blob not in image.layers)
    found: list[str] = config.json()["rootfs"]["diff_ids"]
    return found


@pytest.mark.parametrize("repository", [INDEX, IMAGE])
@pytest.mark.parametrize("form", ["oci", "oci-archive"])
def test_layouts_of_skopeo_keep_every_digest(
    job: Import,
    skopeo: Skopeo,
    registry: Registry,
    held: dict[str, Image],
    tmp_path: Path,
    form: str,
    repository: str,
) -> None:
    source = f"docker://{registry.name}/{repository}:{TAG}"
    skopeo.copy_to(source, f"{form}:{tmp_path / 'made'}:{NAME}", everything=True)
    assert job.run(tmp_path / "made").code == 0
    job.check(NAME, held[repository])


def test_a_layout_with_a_bare_tag_needs_a_name(
    job: Import, skopeo: Skopeo, registry: Registry, held: dict[str, Image], tmp_path: Path
) -> None:
    source = f"docker://{registry.name}/{IMAGE}:{TAG}"
    skopeo.copy_to(source, f"oci:{tmp_path / 'made'}:1")
    assert job.run(tmp_path / "made").code == 2
    assert job.run(tmp_path / "made", "--name", "registry.example/team/app").code == 0
    job.check(NAME, held[IMAGE])


def test_docker_archives_of_skopeo_keep_every_layer(
    job: Import, skopeo: Skopeo, registry: Registry, held: dict[str, Image], tmp_path: Path
) -> None:
    source = f"docker://{registry.name}/{IMAGE}:{TAG}"
    skopeo.copy_to(source, f"docker-archive:{tmp_path / 'made.tar'}:{NAME}")
    done = job.run(tmp_path / "made.tar")
    assert done.code == 0
    assert "digests differ" in "".join(str(event.get("text")) for event in done.events)
    assert layers_of(job, NAME) == diff_ids(held[IMAGE])
    assert job.listed() == {NAME: True}


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_archives_of_podman_save(
    job: Import,
    podman: Podman,
    registry: Registry,
    held: dict[str, Image],
    tmp_path: Path,
    form: str,
) -> None:
    reference = f"{registry.name}/{IMAGE}:{TAG}"
    podman.pull(reference)
    podman.save(reference, tmp_path / "made.tar", form)
    done = job.run(tmp_path / "made.tar")
    assert done.code == 0, done.problems
    assert layers_of(job, reference) == diff_ids(held[IMAGE])
    assert job.listed() == {reference: True}


def test_what_was_imported_from_docker_can_be_pulled_again(
    job: Import, skopeo: Skopeo, registry: Registry, held: dict[str, Image], tmp_path: Path
) -> None:
    """The manifests that are made are such that a client takes them."""
    source = f"docker://{registry.name}/{IMAGE}:{TAG}"
    skopeo.copy_to(source, f"docker-archive:{tmp_path / 'made.tar'}:{NAME}")
    assert job.run(tmp_path / "made.tar").code == 0
    archive = tmp_path / "again.tar"
    assert job.export(archive).returncode == 0
    skopeo.copy_to(f"oci-archive:{archive}:{NAME}", f"dir:{tmp_path / 'taken'}")
    taken = json.loads((tmp_path / "taken" / "manifest.json").read_bytes())
    assert len(taken["layers"]) == len(held[IMAGE].layers)
