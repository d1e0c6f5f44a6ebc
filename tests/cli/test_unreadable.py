"""A manifest whose bytes the disk has lost: each command names it, and goes on where it can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ociproxy.cli.main import main
from ociproxy.store.store import Store
from tests.disk.disk import Disk, faulty_disk
from tests.images import image, multi_platform
from tests.pruning import content_files, names_of, put_aged

GOOD, BAD, MULTI = image("good"), image("bad"), multi_platform("multi")
CHILD = MULTI.manifests[0]
LOST = {BAD.top.encoded, CHILD.encoded}
NAMES = {name: f"quay.io/team/{name}:v1" for name in ("good", "bad", "multi")}
ERROR = "input/output error"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A store on it has three images, and cannot read the manifest of one, nor that of one platform
    of another."""
    with faulty_disk(tmp_path / "faulty") as made:
        store = Store(made.root)
        for name, each in (("good", GOOD), ("bad", BAD), ("multi", MULTI)):
            put_aged(store, NAMES[name], each, 60)
        made.fail("EIO on read", f"/img/[{BAD.top.encoded[0]}{CHILD.encoded[0]}]*")
        yield made


def run(disk: Disk, *words: str) -> Result:
    done = CliRunner(catch_exceptions=False).invoke(main, [*words, "--image-path", str(disk.root)])
    assert "Traceback" not in done.output
    return done


def events(done: Result, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in found if event["event"] == name]


def test_commands_that_read_go_on_and_name_the_files(disk: Disk, tmp_path: Path) -> None:
    for words in (["check"], ["check", "--quick"]):
        done = run(disk, *words, "--json")
        assert done.exit_code == 5
        assert {e["file"] for e in events(done, "damaged")} == {f"img/{name}" for name in LOST}
        assert {e["reason"] for e in events(done, "damaged")} == {f"cannot be read: {ERROR}"}
        assert {e["reference"]: e["status"] for e in events(done, "image")} == {
            NAMES["bad"]: "damaged",
            NAMES["multi"]: "damaged",
        }

    done = run(disk, "list", "--format", "json")
    assert done.exit_code == 0
    found = {each["reference"]: each for each in json.loads(done.stdout)}
    assert {name: each["complete"] for name, each in found.items()} == {
        NAMES["good"]: True,
        NAMES["bad"]: False,
        NAMES["multi"]: False,
    }
    assert found[NAMES["multi"]]["missing"] == [
        {"digest": CHILD.digest, "reason": f"manifest cannot be read: {ERROR}"}
    ]
    for name in LOST:
        assert f"warning: {disk.root}/img/{name} cannot be read: {ERROR}" in done.stderr

    (tmp_path / "list").write_text("\n".join(NAMES.values()))
    done = run(disk, "ready", "--json", str(tmp_path / "list"))
    assert done.exit_code == 3
    assert {e["reference"]: e["ready"] for e in events(done, "image")} == {
        name: found[name]["complete"] for name in found
    }

    done = run(disk, "export", str(tmp_path / "out.tar"))
    assert done.exit_code == 3
    assert done.stderr.count(f"(manifest cannot be read: {ERROR})") == 2
    assert run(disk, "export", str(tmp_path / "out.tar"), "--allow-partial").exit_code == 0


def test_a_prune_removes_nothing_until_a_repair_has_taken_the_file_out(disk: Disk) -> None:
    """What the manifest needs is not known: all blobs would be taken for needed by none."""
    before, disks = content_files(disk.root), ["prune", "*/good:*", "--keep-recent", "0"]
    for more in ([], ["--dry-run"]):
        done = run(disk, *disks, *more)
        assert done.exit_code == 4
        assert any(f"{disk.root}/img/{name}: {ERROR}" in done.stderr for name in LOST)
        assert "`ociproxy check --repair`" in done.stderr
    assert content_files(disk.root) == before
    assert run(disk, "check", "--repair", "--offline").exit_code == 3  # and incomplete still
    assert {each.name for each in (disk.root / "quarantine").iterdir()} == LOST
    assert run(disk, *disks).exit_code == 0
    assert before - content_files(disk.root) == LOST | names_of(GOOD)
