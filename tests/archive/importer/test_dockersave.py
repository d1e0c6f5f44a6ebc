"""Import of `docker save` archives, by hand in every shape they have had, and by real tools."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ociproxy.archive.bundle import Bundle
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests import images
from tests.archive.importing import Done, Import
from tests.layouts import MARKER, blob_path, index_json, write_folder, write_tar

NAME = "docker.io/library/app:1"
LAYERS = [
    gzip.decompress(images.layer({f"data/{n}": images.random_bytes(20_000, seed=n)}).content.data)
    for n in range(2)
]
DIFF_IDS = [images.content(layer).digest for layer in LAYERS]
CONFIG = images.content(
    json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": DIFF_IDS},
        }
    ).encode()
)


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


def manifest_json(config: str, layers: list[str], *tags: str) -> bytes:
    return json.dumps([{"Config": config, "RepoTags": list(tags), "Layers": layers}]).encode()


def old_docker(*tags: str) -> list[tuple[str, bytes]]:
    """As Docker wrote it up to version 24."""
    names = ["aa/layer.tar", "bb/layer.tar"]
    files = [(f"{name.partition('/')[0]}/VERSION", b"1.0") for name in names]
    files += [(f"{name.partition('/')[0]}/json", b'{"id": "aa"}') for name in names]
    files += list(zip(names, LAYERS, strict=True))
    files.append((f"{CONFIG.encoded}.json", CONFIG.data))
    files.append(("manifest.json", manifest_json(f"{CONFIG.encoded}.json", names, *tags)))
    files.append(("repositories", b'{"app": {"1": "bb"}}'))
    return files


def crane(*tags: str) -> list[tuple[str, bytes]]:
    """Packed layers, and a config that is named by its digest alone."""
    packed = [gzip.compress(layer, mtime=0) for layer in LAYERS]
    names = [f"{images.content(layer).encoded}.tar.gz" for layer in packed]
    files = [(CONFIG.digest, CONFIG.data), *zip(names, packed, strict=True)]
    return [*files, ("manifest.json", manifest_json(CONFIG.digest, names, *tags))]


def stored(job: Import, name: str) -> dict[str, Any]:
    """The manifest that a tag stands for."""
    store, reference = Store(job.store), Reference.parse(name)
    assert reference.tag is not None
    record = store.refs.find_tag(reference.repository, reference.tag)
    assert record is not None
    holder = store.manifests.find(record.descriptor.digest)
    assert holder is not None
    document: dict[str, Any] = json.loads(holder.raw)
    for blob in (document["config"], *document["layers"]):
        path = store.blobs.path(Digest.parse(blob["digest"]))
        assert path.stat().st_size == blob["size"]
    return document


def says_digests_are_made(done: Done) -> bool:
    notes = [event["text"] for event in done.events if event["event"] == "note"]
    return len(notes) == 1 and "digests differ from the registry's" in notes[0]


@pytest.mark.parametrize(
    ("files", "suffix"), [(old_docker, ""), (crane, "+gzip")], ids=["docker", "crane"]
)
def test_layers_stay_as_they_are(
    job: Import,
    tmp_path: Path,
    files: Callable[..., list[tuple[str, bytes]]],
    suffix: str,
) -> None:
    done = job.run(write_tar(tmp_path / "x.tar", files("app:1", "quay.io/team/app:2")))
    assert done.code == 0
    assert done.statuses == {NAME: "imported", "quay.io/team/app:2": "imported"}
    assert says_digests_are_made(done)
    document = stored(job, NAME)
    assert document["config"]["digest"] == CONFIG.digest
    media_types = [layer["mediaType"] for layer in document["layers"]]
    assert media_types == [f"application/vnd.oci.image.layer.v1.tar{suffix}"] * 2
    if not suffix:
        assert [layer["digest"] for layer in document["layers"]] == DIFF_IDS
    assert job.listed() == dict.fromkeys(done.statuses, True)


def docker_25(*tags: str) -> dict[str, bytes]:
    """As Docker 25.0 wrote some images: a layout whose manifest has lost its layers."""
    blobs = [CONFIG, *map(images.content, LAYERS)]
    hollow = {
        "schemaVersion": 2,
        "mediaType": images.OCI_MANIFEST,
        "config": {**CONFIG.descriptor(), "mediaType": images.OCI_CONFIG},
        "layers": [],
    }
    top = images.content(json.dumps(hollow).encode(), images.OCI_MANIFEST)
    paths = [blob_path(each) for each in blobs]
    return {
        "oci-layout": MARKER,
        "index.json": index_json([(f"docker.io/library/{tag}", top) for tag in tags]),
        "manifest.json": manifest_json(paths[0], paths[1:], *tags),
        blob_path(top): top.data,
        **{path: blob.data for path, blob in zip(paths, blobs, strict=True)},
    }


def test_a_manifest_that_has_lost_its_layers_is_made_anew(job: Import, tmp_path: Path) -> None:
    done = job.run(write_tar(tmp_path / "x.tar", docker_25("app:1").items()))
    assert (done.code, done.statuses) == (0, {NAME: "imported"}), done.problems
    assert says_digests_are_made(done)
    assert [layer["digest"] for layer in stored(job, NAME)["layers"]] == DIFF_IDS


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_an_image_is_not_whole_without_the_layers_of_its_config(
    job: Import, tmp_path: Path, write: Callable[..., Path]
) -> None:
    files = docker_25("app:1")
    del files["manifest.json"]
    done = job.run(write(tmp_path / "x", files.items()))
    assert (done.code, done.statuses) == (5, {NAME: "incomplete"})
    assert "it names no layers, and its config 2" in done.problems[0]
    assert job.listed() == {}


def test_a_bundle_does_not_serve_an_image_that_has_lost_its_layers(tmp_path: Path) -> None:
    with Bundle(write_tar(tmp_path / "x.tar", docker_25("app:1").items())) as bundle:
        assert bundle.images == 0
        [(name, reason)] = bundle.left_out
    assert name == NAME
    assert "import the archive" in reason


def test_the_same_archive_makes_the_same_digest(job: Import, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", old_docker("app:1"))
    backwards = write_tar(tmp_path / "y.tar", reversed(old_docker("app:1")))
    job.run(archive)
    assert job.run(backwards).statuses == {NAME: "unchanged"}


def test_a_second_time_writes_nothing_anew(job: Import, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", old_docker("app:1"))
    job.run(archive)
    before = {path: path.stat().st_ino for path in (job.store / "blobs").iterdir()}
    job.run(archive)
    assert {path: path.stat().st_ino for path in (job.store / "blobs").iterdir()} == before


def test_layers_may_be_links_within_the_archive(job: Import, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in old_docker("app:1"):
            info = tarfile.TarInfo(name)
            if name == "aa/layer.tar":
                info.type, info.linkname = tarfile.SYMTYPE, "../real.tar"
                tar.addfile(info)
                info = tarfile.TarInfo("real.tar")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert job.run(path).code == 0
    assert [layer["digest"] for layer in stored(job, NAME)["layers"]] == DIFF_IDS


def test_an_image_without_a_tag_needs_a_name(job: Import, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", old_docker())
    assert job.run(archive).code == 2
    assert job.run(archive, "--name", "app:1").code == 0
    stored(job, NAME)


def test_crane_s_mark_of_a_digest_is_no_tag(job: Import, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", old_docker("quay.io/t/x:i-was-a-digest"))
    assert job.run(archive).code == 2
    assert job.run(archive, "--name", "app:1").code == 0
    stored(job, NAME)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f | {"bb/layer.tar": LAYERS[0]}, "which the config asks for"),
        (lambda f: {k: v for k, v in f.items() if k != "bb/layer.tar"}, "'bb/layer.tar' is not in"),
        (lambda f: {k: v for k, v in f.items() if k != f"{CONFIG.encoded}.json"}, "config"),
        (lambda f: f | {f"{CONFIG.encoded}.json": b'{"rootfs": 1}'}, "2 layers"),
        (lambda f: f | {"manifest.json": b"[1]"}, "not an object"),
        (lambda f: f | {"manifest.json": b"{}"}, "not a list"),
        (lambda f: f | {"manifest.json": b"["}, "not JSON"),
        (
            lambda f: f | {"manifest.json": manifest_json("x", ["/etc/passwd"], "app:1")},
            "config 'x' is not in",
        ),
        (
            lambda f: (
                f
                | {"manifest.json": manifest_json(f"{CONFIG.encoded}.json", ["../x"] * 2, "app:1")}
            ),
            "layer '../x' is not in",
        ),
        (lambda f: f | {"manifest.json": json.dumps([{"Config": 1}]).encode()}, "no config"),
        (
            lambda f: (
                f
                | {
                    "manifest.json": manifest_json(
                        f"{CONFIG.encoded}.json", ["aa/layer.tar", "bb/layer.tar"], "!!"
                    )
                }
            ),
            "invalid name",
        ),
        (lambda f: {k: v for k, v in f.items() if k != "manifest.json"}, "Docker 1.10"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_visible(
    job: Import,
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], dict[str, bytes]],
    said: str,
) -> None:
    files = change(dict(old_docker("app:1")))
    done = job.run(write_tar(tmp_path / "x.tar", files.items()))
    assert done.code == 5
    assert said in done.problems[0]
    assert job.listed() == {}


def test_a_cut_archive_is_named_as_one(job: Import, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", old_docker("app:1"))
    archive.write_bytes(archive.read_bytes()[:30_000])
    done = job.run(archive)
    assert done.code == 5
    assert "nothing to import" in done.problems[0]
