"""What moved between two of store, archive and lock."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ociproxy.store.store import Store
from tests.images import MIB, Image, image, image_of, index, layer, multi_platform, random_bytes
from tests.stores import put, stored


def run(*args: object, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ociproxy", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def compare(first: Path, second: Path, *, code: int = 1) -> Any:
    return json.loads(run("diff", "--json", first, second, code=code).stdout)


def fill(path: Path, **images: Image) -> Path:
    store = Store(path)
    for tag, made in images.items():
        put(store, f"quay.io/a/b:{tag}", made)
    return path


def as_kind(store: Path, kind: str) -> Path:
    """The same content as a store, an archive or a lock."""
    if kind == "store":
        return store
    archive = store.with_suffix(".tar")
    run("export", archive, "--image-path", store, code=0)
    if kind == "archive":
        return archive
    lock = store.with_suffix(".lock")
    with tarfile.open(archive) as tar:
        member = tar.extractfile("ociproxy-lock.json")
        assert member is not None
        lock.write_bytes(member.read())
    return lock


@pytest.mark.parametrize("kind", ["store", "archive", "lock"])
def test_a_store_its_archive_and_its_lock_are_equal(tmp_path: Path, kind: str) -> None:
    store = fill(tmp_path / "a", one=multi_platform(), two=image())
    done = run("diff", store, as_kind(store, kind), code=0)
    assert done.stdout == "no difference\n"


@pytest.mark.parametrize(("first", "second"), [("store", "archive"), ("lock", "store")])
def test_what_was_added_removed_and_moved(tmp_path: Path, first: str, second: str) -> None:
    kept, gone, old = image("kept"), image("gone"), image("old")
    new, fresh = image("new"), image("fresh")
    one = as_kind(fill(tmp_path / "a", kept=kept, gone=gone, moved=old), first)
    two = as_kind(fill(tmp_path / "b", kept=kept, fresh=fresh, moved=new), second)
    found = compare(one, two)
    assert found["different"] is True
    assert [each["reference"] for each in found["added"]] == ["quay.io/a/b:fresh"]
    assert [each["reference"] for each in found["removed"]] == ["quay.io/a/b:gone"]
    assert found["moved"] == [
        {"reference": "quay.io/a/b:moved", "from": old.digest, "to": new.digest}
    ]
    carried = {each.digest: each.size for made in (new, fresh) for each in made.all_content()}
    assert {each["digest"] for each in found["carry"]["contents"]} == set(carried)
    assert found["carry"]["bytes"] == sum(carried.values())
    text = run("diff", one, two, code=1).stdout
    assert "+ quay.io/a/b:fresh" in text
    assert "- quay.io/a/b:gone" in text
    assert "~ quay.io/a/b:moved" in text
    assert "1 added, 1 removed, 1 moved, 0 changed" in text


def test_shared_layers_are_not_carried(tmp_path: Path) -> None:
    base = layer({"base": random_bytes(MIB)})
    top = layer({"top": b"small"})
    old, new = image_of([base]), image_of([base, top])
    found = compare(fill(tmp_path / "a", x=old), fill(tmp_path / "b", x=new))
    carried = {each["digest"] for each in found["carry"]["contents"]}
    assert carried == {each.digest for each in new.all_content()} - {base.content.digest}
    assert found["carry"]["bytes"] < 20_000


def test_another_platform_of_the_same_digest_is_a_change(tmp_path: Path) -> None:
    made = multi_platform()
    one = fill(tmp_path / "a", x=made)
    stored(Store(one), made.manifests[1]).unlink()
    found = compare(one, fill(tmp_path / "b", x=made))
    [change] = found["changed"]
    assert set(change["to"]["platforms"]) - set(change["from"]["platforms"]) == {"linux/arm64"}
    assert found["moved"] == []


def test_a_platform_does_not_speak_to_the_terminal(tmp_path: Path) -> None:
    """An archive may call a platform anything, a command for the terminal and no Unicode too."""
    made = index({"linux/amd64": image("a"), "linux/\x1b[31m\ud800": image("b")})
    one = fill(tmp_path / "a", x=made)
    stored(Store(one), made.manifests[1]).unlink()
    text = run("diff", one, fill(tmp_path / "b", x=made), code=1).stdout
    assert "linux/?[31m?" in text
    assert "\x1b" not in text


def test_an_incomplete_image_is_a_change(tmp_path: Path) -> None:
    made = image()
    one = fill(tmp_path / "a", x=made)
    stored(Store(one), made.layers[0]).unlink()
    text = run("diff", one, fill(tmp_path / "b", x=made), code=1).stdout
    assert "(incomplete)" in text


def test_an_empty_store_has_everything_to_carry(tmp_path: Path) -> None:
    made = image()
    empty = fill(tmp_path / "empty")
    found = compare(empty, fill(tmp_path / "b", x=made))
    assert found["carry"]["bytes"] == sum(each.size for each in made.all_content())
    assert run("diff", empty, empty, code=0).stdout == "no difference\n"


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [
        (None, 2, "no such file"),
        (b"{}", 2, "ociproxy-lock/1"),
        (b"garbage" * 1000, 5, "neither a tar"),
        (b"", 2, "not JSON"),
    ],
)
def test_what_is_none_of_the_three_is_named(
    tmp_path: Path, content: bytes | None, code: int, reason: str
) -> None:
    store = fill(tmp_path / "a", x=image())
    if content is not None:
        (tmp_path / "odd").write_bytes(content)
    done = run("diff", store, tmp_path / "odd", code=code)
    assert str(tmp_path / "odd") in done.stderr
    assert reason in done.stderr


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = run("diff", tmp_path / "folder", tmp_path / "folder", code=4)
    assert "no store" in done.stderr
    assert list((tmp_path / "folder").iterdir()) == []
