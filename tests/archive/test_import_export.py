"""What `export` wrote, imported again: archives, volumes, deltas, partial ones, and damage."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests import images
from tests.archive.importing import Import
from tests.stores import put, stored

IMAGES = {
    "quay.io/team/app:1": images.multi_platform("app", layers=2, layer_size=50_000),
    "registry.k8s.io/list:2": images.multi_platform("list", docker=True),
    "docker.io/library/plain:3": images.image("plain", layers=3, layer_size=200_000),
}


@pytest.fixture
def source(tmp_path: Path) -> Store:
    store = Store(tmp_path / "source")
    for name, image in IMAGES.items():
        put(store, name, image)
    return store


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


def export(store: Store, *args: object) -> None:
    command = [sys.executable, "-m", "ociproxy", "export", "--image-path", store.root]
    done = subprocess.run(
        [*map(str, command), *map(str, args)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def refs(store: Path) -> dict[str, object]:
    """Every record below refs/ and referrers/, without the times."""
    found: dict[str, object] = {}
    for folder in ("refs", "referrers"):
        for path in sorted((store / folder).rglob("*")):
            if path.is_file():
                document = json.loads(path.read_bytes())
                document.pop("resolved", None)
                found[str(path.relative_to(store))] = document
    return found


def content(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for folder in ("blobs", "fat", "img")
        for path in (store / folder).iterdir()
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.tar", []), ("a.tar.zst", ["--zstd"]), ("a.tar", ["--format", "cache"])],
)
def test_a_store_comes_back_as_it_was(
    source: Store, job: Import, tmp_path: Path, name: str, options: list[str]
) -> None:
    sbom = images.artifact(IMAGES["quay.io/team/app:1"].top)
    put(source, f"quay.io/team/app@{sbom.digest}", sbom)
    export(source, tmp_path / name, *options)
    assert job.run(tmp_path / name).code == 0
    assert refs(job.store) == refs(source.root)
    assert content(job.store) == content(source.root)


def test_what_comes_back_is_exported_as_the_same_bytes(
    source: Store, job: Import, tmp_path: Path
) -> None:
    export(source, tmp_path / "a.tar")
    job.run(tmp_path / "a.tar")
    export(Store(job.store), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_form_for_other_tools_comes_back_too(
    source: Store, job: Import, tmp_path: Path
) -> None:
    export(
        source, tmp_path / "a.tar", "--format", "oci", "--platform", "linux/amd64", "--digest-names"
    )
    done = job.run(tmp_path / "a.tar")
    assert done.code == 0
    assert {name for name in done.statuses if "@" not in name} == set(IMAGES)
    job.check("docker.io/library/plain:3", IMAGES["docker.io/library/plain:3"])


def test_volumes_are_imported_together_in_any_order(
    source: Store, job: Import, tmp_path: Path
) -> None:
    export(source, tmp_path / "a.tar", "--volume-size", "300KiB")
    volumes = sorted(tmp_path.glob("a.*.tar"))
    assert len(volumes) > 2
    shuffled = volumes.copy()
    random.Random(3).shuffle(shuffled)
    assert job.run(*shuffled).code == 0
    assert content(job.store) == content(source.root)


def test_without_one_volume_nothing_is_read(source: Store, job: Import, tmp_path: Path) -> None:
    export(source, tmp_path / "a.tar", "--volume-size", "300KiB")
    volumes = sorted(tmp_path.glob("a.*.tar"))
    for number in range(len(volumes)):
        done = job.run(*volumes[:number], *volumes[number + 1 :])
        assert done.code == 2
        assert f"give volume {number + 1} too" in done.stderr
    assert job.blobs() == set()
    again = tmp_path / "again"
    again.write_bytes(volumes[0].read_bytes())
    done = job.run(*volumes, again)
    assert done.code == 2
    assert "volume 1, and so is" in done.stderr


def test_a_volume_that_is_cut_holds_back_what_was_in_it(
    source: Store, job: Import, tmp_path: Path
) -> None:
    export(source, tmp_path / "a.tar", "--volume-size", "300KiB")
    volumes = sorted(tmp_path.glob("a.*.tar"))
    volumes[-1].write_bytes(volumes[-1].read_bytes()[:50_000])
    done = job.run(*volumes)
    assert done.code == 5
    assert "incomplete" in done.statuses.values()
    assert "imported" in done.statuses.values()
    assert all(job.listed().values())


def test_a_delta_needs_its_base(source: Store, job: Import, tmp_path: Path) -> None:
    export(source, tmp_path / "base.tar")
    plain = IMAGES["docker.io/library/plain:3"]
    newer = images.image("plain", layers=4, layer_size=200_000)
    assert set(plain.layers) < set(newer.layers)
    put(source, "docker.io/library/plain:4", newer)
    put(source, "quay.io/team/other:1", images.image("other"))
    export(source, tmp_path / "delta.tar", "--since", tmp_path / "base.tar")
    done = job.run(tmp_path / "delta.tar")
    assert done.code == 5
    assert set(done.statuses.values()) == {"incomplete"}
    told = [problem for problem in done.problems if "import the base first" in problem]
    assert len(told) == len(done.statuses)
    named = [problem for problem in done.problems if problem.startswith("sha256:")]
    assert len(named) == len(set(named)), "each blob once, not once an image"
    assert named
    assert len(done.problems) == len(named) + len(told)
    assert job.listed() == {}
    assert job.run(tmp_path / "base.tar").code == 0
    assert job.run(tmp_path / "delta.tar").code == 0
    assert content(job.store) == content(source.root)
    job.check("docker.io/library/plain:4", newer)


def test_a_base_that_rots_is_no_base(source: Store, job: Import, tmp_path: Path) -> None:
    export(source, tmp_path / "base.tar")
    newer = images.image("plain", layers=4, layer_size=200_000)
    put(source, "docker.io/library/plain:4", newer)
    export(source, tmp_path / "delta.tar", "--since", tmp_path / "base.tar")
    job.run(tmp_path / "base.tar")
    layer = stored(Store(job.store), newer.layers[0])
    layer.write_bytes(bytes(newer.layers[0].size))
    done = job.run(tmp_path / "delta.tar")
    assert done.code == 5
    assert any(newer.layers[0].digest in problem for problem in done.problems)
    assert "docker.io/library/plain:4" not in job.listed()


def test_what_was_exported_incomplete_is_not_published(
    source: Store, job: Import, tmp_path: Path
) -> None:
    stored(source, IMAGES["docker.io/library/plain:3"].layers[0]).unlink()
    export(source, tmp_path / "a.tar", "--allow-partial")
    done = job.run(tmp_path / "a.tar")
    assert done.code == 5
    assert done.statuses["docker.io/library/plain:3"] == "incomplete"
    assert any("--allow-partial" in problem for problem in done.problems)
    assert set(job.listed()) == set(IMAGES) - {"docker.io/library/plain:3"}


def test_a_lock_knows_what_a_cut_took(source: Store, job: Import, tmp_path: Path) -> None:
    """A child that the end was cut off from is not taken for one that was left out."""
    export(source, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    kept = set()
    for cut in itertools.chain(range(2000, 40_000, 3000), range(40_000, len(whole), 100_000)):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        fresh = Import(tmp_path / str(cut))
        done = fresh.run(tmp_path / "cut.tar")
        assert done.code == 5
        kept.add(len(fresh.listed()))
        for name in fresh.listed():
            fresh.check(name, IMAGES[name])
    assert kept == {0, 1}


def test_a_child_that_the_lock_lists_may_not_be_absent(
    source: Store, job: Import, tmp_path: Path
) -> None:

    export(source, tmp_path / "a.tar")
    app = IMAGES["quay.io/team/app:1"]
    absent = f"blobs/sha256/{app.manifests[1].encoded}"
    with tarfile.open(tmp_path / "a.tar") as old, tarfile.open(tmp_path / "b.tar", "w") as new:
        for member in old:
            if member.name != absent:
                new.addfile(member, old.extractfile(member))
    done = job.run(tmp_path / "b.tar")
    assert done.code == 5
    assert done.statuses["quay.io/team/app:1"] == "incomplete"
    assert app.manifests[1].digest in " ".join(done.problems)


def test_what_the_lock_does_not_list_is_left_out(
    source: Store, job: Import, tmp_path: Path
) -> None:

    export(source, tmp_path / "a.tar")
    stray = images.random_blob(10_000)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo(f"blobs/sha256/{stray.encoded}")
        member.size = stray.size
        tar.addfile(member, io.BytesIO(stray.data))
    assert job.run(tmp_path / "a.tar").code == 0
    assert stray.encoded not in job.blobs()
