"""Import of an ociregistry's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests import images
from tests.archive.importing import Import
from tests.archive.ociregistry_cache import holder_1_3, holder_1_17, write_cache

VERSIONS = pytest.mark.parametrize("version", ["1.3", "1.17"])
IMAGES = {
    "quay.io/team/app:1.0": images.multi_platform("app"),
    "registry.k8s.io/team/list:latest": images.multi_platform("list", docker=True),
    "docker.io/library/plain:2": images.image("plain", layer_size=100_000),
    "docker.io/library/old:latest": images.image("old", docker=True),
}


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


@pytest.mark.parametrize(
    ("content", "newer", "older"),
    [
        (
            images.multi_platform(
                "ociregistry", docker=True, platforms=("linux/amd64", "linux/arm/v7")
            ).top,
            "6949ff89824da14c75c8c7e696fb75fc1d92e4e3236dabf3b5cf0e5b513f9803",
            "99a11a9e55a8695c952f7678c09f795a6a123d3ab1334937b0535c66d0e73a1a",
        ),
        (
            images.multi_platform("ociregistry", docker=True).manifests[0],
            "6fe0caf5dbe8dc5a9f49408d341fb0554d06dd7abb929c5536f9f996926992e6",
            "a15de5cac5d4cb35d308a5f343056ba288f090d7588f100fe29ddca08fe739b9",
        ),
        (
            images.image("ociregistry").top,
            "4c82e9858c564501239b69a96e5538e5ac4d9d0f39dfd4d8805dfe2330bad56e",
            "c8cb611bce8394c4e198971ebb0f9aa1f5c31551b8277d6c5fce50b5fab6239e",
        ),
        (
            images.multi_platform("ociregistry", platforms=("linux/amd64",)).top,
            "f653e5fae59d2d2bd253f107224c9508ac704b8832e53b3619d334b1ce016ebc",
            "74946d047956cbb0ff5d108f74fe3c39d2ccab56dcb205d05e8689973480671c",
        ),
    ],
    ids=["list", "docker", "oci", "index"],
)
def test_the_fixtures_are_what_ociregistry_writes(
    content: images.Content, newer: str, older: str
) -> None:
    """The sums are of what its own Go code (imgpull 1.15.1; ociregistry 1.3.0) made of these."""
    name = "registry.example/team/app:1.0"
    assert hashlib.sha256(holder_1_17(content, name)).hexdigest() == newer
    assert hashlib.sha256(holder_1_3(content, name)).hexdigest() == older


@VERSIONS
def test_everything_in_a_cache_is_imported(job: Import, tmp_path: Path, version: str) -> None:
    done = job.run(write_cache(tmp_path / "cache", version, IMAGES))
    assert done.code == 0
    assert set(done.statuses.values()) == {"imported"}
    for name, image in IMAGES.items():
        job.check(name, image)


@VERSIONS
def test_what_was_pulled_by_digest_only_is_there_by_digest(
    job: Import, tmp_path: Path, version: str
) -> None:
    image = images.image("loose")
    name = f"quay.io/team/loose@{image.digest}"
    cache = write_cache(tmp_path / "cache", version, {})
    cache.mkdir(exist_ok=True)
    write_cache(cache, version, {"quay.io/team/loose:1": image})
    path = cache / "img" / image.top.encoded
    make = holder_1_3 if version == "1.3" else holder_1_17
    path.write_bytes(make(image.top, name))
    assert job.run(cache).statuses == {name: "imported"}
    job.check(name, image)


@VERSIONS
def test_of_a_tag_that_moved_the_newest_is_taken(job: Import, tmp_path: Path, version: str) -> None:
    name = "quay.io/team/app:latest"
    cache = write_cache(tmp_path / "cache", version, {name: images.image("new")})
    old = write_cache(tmp_path / "old", version, {name: images.image("old")})
    for path in old.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
            path.rename(cache / path.relative_to(old))
    assert job.run(cache).code == 0
    job.check(name, images.image("new"))
    job.check(f"quay.io/team/app@{images.image('old').digest}", images.image("old"))


@VERSIONS
def test_an_image_without_all_its_blobs_is_held_back(
    job: Import, tmp_path: Path, version: str
) -> None:
    cache = write_cache(tmp_path / "cache", version, IMAGES)
    plain = IMAGES["docker.io/library/plain:2"]
    (cache / "blobs" / plain.layers[0].encoded).unlink()
    done = job.run(cache)
    assert done.code == 5
    assert done.statuses.pop("docker.io/library/plain:2") == "incomplete"
    assert done.problems == [f"layer {plain.layers[0].digest}: neither here nor in the store"]
    assert "docker.io/library/plain:2" not in job.listed()
    assert len([name for name in job.listed() if "@" not in name]) == len(IMAGES) - 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bytes": "!"}, "not base64"),
        ({"bytes": None}, "no manifest holder"),
        ({"digest": "0" * 64}, "expected digest"),
        ({"digest": "../../etc"}, "invalid digest"),
        ({"imageUrl": "quay.io/../../x:1"}, "invalid name"),
        ({"imageUrl": f"quay.io/a/b@sha256:{'0' * 64}"}, "is not sha256:"),
        ({"type": 9}, "what type"),
        ({"type": 1}, ""),
    ],
)
def test_a_damaged_holder_is_named_and_the_rest_imported(
    job: Import, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    cache = write_cache(tmp_path / "cache", "1.17", IMAGES)
    broken = cache / "lts" / IMAGES["docker.io/library/old:latest"].top.encoded
    broken.write_text(json.dumps({**json.loads(broken.read_bytes()), **change}))
    done = job.run(cache)
    if not said:  # the right type: Docker's
        assert done.code == 0
        return
    assert done.code == 5
    (problem,) = done.problems
    assert said in problem
    assert broken.name in problem
    assert len([name for name in job.listed() if "@" not in name]) == len(IMAGES) - 1


def test_links_in_a_cache_are_not_followed(job: Import, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", "1.17", IMAGES)
    plain = IMAGES["docker.io/library/plain:2"]
    blob = cache / "blobs" / plain.layers[0].encoded
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    done = job.run(cache)
    assert done.code == 5
    assert done.statuses["docker.io/library/plain:2"] == "incomplete"


def test_a_cache_is_not_imported_into_itself(job: Import) -> None:
    write_cache(job.store, "1.3", IMAGES)
    before = sorted(path.name for path in job.store.iterdir())
    done = job.run(job.store)
    assert done.code == 2
    assert "is the store itself" in done.stderr
    assert sorted(path.name for path in job.store.iterdir()) == before


def test_an_empty_folder_is_no_cache(job: Import, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    done = job.run(tmp_path / "cache")
    assert done.code == 5
    assert "nothing to import" in done.problems[0]
