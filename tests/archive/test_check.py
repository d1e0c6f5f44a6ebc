"""`ociproxy check ARCHIVE`: the same findings in what `import` reads."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import Content, Image, content, image, multi_platform
from tests.layouts import blob_path, members, tar_bytes, write_folder, write_tar
from tests.parts.tools import run
from tests.server import ROOT
from tests.stores import put

MADE, OTHER = multi_platform("carried", layers=2), image("other")
NAME, OTHER_NAME = "quay.io/a/b:1", "quay.io/other:1"
IMAGES = {NAME: MADE, OTHER_NAME: OTHER}


def check(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = run(sys.executable, "-m", "ociproxy", "check", *words, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr.decode() + done.stdout.decode()
    return done


def events(*words: str | Path, code: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in check("--json", *words, code=code).stdout.splitlines()]


def flipped(content: Content) -> dict[str, bytes]:
    data = bytearray(content.data)
    data[-1] ^= 1
    return {content.digest: bytes(data)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "cache.tar", members(IMAGES))


def test_a_whole_archive_is_one_line_and_leaves_nothing_behind(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    [line] = check(archive).stderr.decode().splitlines()
    blobs = len({each.digest for made in IMAGES.values() for each in made.blobs})
    assert line.startswith(f"all is whole. {blobs} blobs, 5 manifests, 2 images; read ")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("form", ["tar", "gzip", "folder"])
def test_a_flipped_bit_is_named_with_its_images(tmp_path: Path, form: str) -> None:
    layer = MADE.layers[0]
    files = list(members(IMAGES, replaced=flipped(layer)))
    source = tmp_path / "source"
    if form == "folder":
        write_folder(source, files)
    else:
        raw = tar_bytes(files)
        source.write_bytes(gzip.compress(raw) if form == "gzip" else raw)
    file, broken, done = events(source, code=5)
    assert (file["event"], file["file"], file["digest"]) == (
        "damaged",
        blob_path(layer),
        layer.digest,
    )
    assert file["images"] == [NAME]
    assert (broken["reference"], broken["status"]) == (NAME, "damaged")
    assert [each["digest"] for each in broken["problems"]] == [layer.digest]
    assert done["found"] == {"damaged files": 1, "damaged images": 1}


def test_a_damaged_manifest_and_a_missing_blob(tmp_path: Path) -> None:
    files = members(IMAGES, replaced=flipped(OTHER.top), without=[MADE.blobs[0]])
    source = write_tar(tmp_path / "source", files)
    text = check(source, code=5).stderr.decode()
    assert f"damaged {source}: {blob_path(OTHER.top)}: " in text
    assert f"needed by {OTHER_NAME}" in text
    assert f"incomplete {NAME}@{MADE.digest}:" in text
    assert f"  {MADE.blobs[0].digest} (config not in the archive)" in text


def test_a_missing_blob_exits_with_3(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "source", members(IMAGES, without=[OTHER.layers[0]]))
    assert [each.get("reference") for each in events(source, code=3)] == [OTHER_NAME, None]


def test_what_is_cut_off_is_damaged_and_the_rest_is_told(archive: Path) -> None:
    raw = archive.read_bytes()
    archive.write_bytes(raw[: len(raw) - 12_000])
    *found, failed, done = events(archive, code=5)
    assert (failed["event"], "cut off" in failed["reason"]) == ("failed", True)
    assert done["found"]["failed archives"] == 1
    assert {each["reference"] for each in found if each["event"] == "image"} <= set(IMAGES)


def test_each_of_several_archives_is_told(archive: Path, tmp_path: Path) -> None:
    none = tmp_path / "notes.txt"
    none.write_text("no archive")
    failed, done = events(none, archive, code=5)
    assert (failed["source"], done["images"]) == (str(none), 2)


def test_what_export_writes_is_whole_and_a_delta_misses_nothing(tmp_path: Path) -> None:
    store, images = Store(tmp_path / "store"), tmp_path
    put(store, NAME, MADE)
    export = [sys.executable, "-m", "ociproxy", "export", "--image-path", str(store.root)]
    run(*export, images / "base.tar", cwd=ROOT)
    put(store, OTHER_NAME, OTHER)
    run(*export, images / "delta.tar", "--since", images / "base.tar", cwd=ROOT)
    run(*export, images / "parts.tar", "--volume-size", "20K", cwd=ROOT)
    volumes = sorted(images.glob("parts.*of*.tar"))
    assert len(volumes) > 1
    for sources in ([images / "base.tar"], [images / "delta.tar"], volumes):
        assert check(*sources).stderr.decode().startswith("all is whole"), sources


def test_a_platform_that_an_archive_lost_is_missed(tmp_path: Path) -> None:
    """An index may lack children, but not those that the lock of the archive lists."""
    store = Store(tmp_path / "store")
    put(store, NAME, MADE)
    source = tmp_path / "cache.tar"
    run(sys.executable, "-m", "ociproxy", "export", "--image-path", store.root, source, cwd=ROOT)

    child = MADE.manifests[1]
    with tarfile.open(source) as tar, tarfile.open(tmp_path / "lossy.tar", "w") as lossy:
        for member in tar.getmembers():
            if member.name != blob_path(child):
                lossy.addfile(member, tar.extractfile(member))
    [broken, _] = events(tmp_path / "lossy.tar", code=3)
    assert [each["digest"] for each in broken["problems"]] == [child.digest]


def test_a_store_is_no_archive(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert b"--image-path" in check(store.root, code=2).stderr


def test_sha512_is_hashed_as_such(tmp_path: Path) -> None:
    manifest = OTHER.top.json()
    layer = OTHER.layers[0]
    strong = str(Digest.of(layer.data, "sha512"))
    manifest["layers"][0]["digest"] = strong

    top = content(json.dumps(manifest).encode(), OTHER.top.media_type)
    moved = Content(layer.media_type, layer.data, strong)
    made = Image(top, blobs=(OTHER.blobs[0], moved))
    good = write_tar(tmp_path / "good", members({NAME: made}))
    bad = write_tar(tmp_path / "bad", members({NAME: made}, replaced=flipped(moved)))
    check(good)
    assert events(bad, code=5)[0]["digest"] == strong
