"""A check that was interrupted, and a scrub, go on where the one before came to."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ociproxy.cli import check_passes
from ociproxy.cli.main import main
from ociproxy.store.passes import PassFile
from ociproxy.store.store import Store
from tests.images import Image, image
from tests.parts.tools import run
from tests.server import ROOT, upstream_entry
from tests.stores import damage, put, stored
from tests.upstream import FakeUpstream

MADE = image("passing", layers=24, layer_size=2000)
SIZE = sum(each.size for each in MADE.all_content())
LIMIT = 20.0


class Scene:
    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        upstream.add("app", MADE, tag="1")
        self.reference = f"{upstream.registry}/app:1"
        self.store = Store(folder / "store")
        self.config = folder / "config.yaml"
        self.entry = upstream_entry(upstream.url)
        put(self.store, self.reference, MADE)
        self.configure()

    def configure(self, **store: object) -> None:
        document = {"upstreams": [self.entry], "store": store}
        self.config.write_text(yaml.safe_dump(document), encoding="utf-8")

    def command(self, *words: str) -> list[str]:
        where = ["--image-path", str(self.store.root), "--config-path", str(self.config)]
        return [sys.executable, "-m", "ociproxy", "check", "--json", *where, *words]

    def check(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        done = run(*self.command(*words), check=False, cwd=ROOT)
        assert done.returncode == code, done.stderr.decode() + done.stdout.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def scene(tmp_path: Path, upstream: FakeUpstream) -> Scene:
    return Scene(tmp_path, upstream)


def in_order(made: Image) -> list[Any]:
    return sorted(made.all_content(), key=lambda each: each.encoded)


def test_an_interrupted_check_goes_on_where_it_was_and_still_knows_the_damage(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_order(MADE)[0]
    damage(stored(scene.store, first))
    monkeypatch.setattr(check_passes, "_SAVE_EVERY", 0.0)
    passes = PassFile(scene.store, "check")

    def interrupt() -> None:
        end = time.monotonic() + LIMIT
        while ((found := passes.read()) is None or found.part < 0.25) and time.monotonic() < end:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    words = scene.command("--resume", "--jobs", "1", "--rate", str(SIZE // 4))[3:]
    done = CliRunner().invoke(main, words)
    interrupting.join()
    assert done.exit_code == 130, done.output
    before = passes.read()
    assert before is not None
    assert 0.25 <= before.part < 1
    monkeypatch.undo()

    found = scene.check("--resume", code=5)
    assert found[0]["event"] == "resumed"
    [damaged] = [each for each in found if each["event"] == "damaged"]
    assert damaged["digest"] == first.digest
    assert damaged["images"] == [scene.reference]
    assert found[-1]["bytes"] < SIZE
    # This one came to its end: the next begins anew.
    assert scene.check("--resume", code=5)[-1]["bytes"] == SIZE


def test_a_scrub_reads_what_is_due_and_finds_heals_and_names_what_has_rotted(
    scene: Scene,
) -> None:
    scene.configure(scrub="10h")
    [first] = [event for event in scene.check("--scrub") if event["event"] == "scrub"]
    assert 0 < first["part"] < 0.2
    rotten = sorted(MADE.blobs, key=lambda each: each.encoded)[-1]
    file = stored(scene.store, rotten)
    state = file.stat()
    damage(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # no stat shows it
    scene.check("--quick")
    # The file says that the pass began long ago: all the rest is due.
    passes = PassFile(scene.store, "scrub")
    document = json.loads((scene.store.root / "scrub.json").read_bytes())
    document["began"] -= 36000.0
    (scene.store.root / "scrub.json").write_text(json.dumps(document))
    found = {event["event"]: event for event in scene.check("--scrub", code=5)}
    assert found["damaged"]["digest"] == rotten.digest
    assert found["damaged"]["images"] == [scene.reference]
    assert found["repaired"]["reference"] == scene.reference
    assert found["scrub"]["part"] == 1.0
    assert file.read_bytes() == rotten.data
    assert (scene.store.quarantine / rotten.encoded).exists()
    done = passes.read()
    assert done is not None
    assert (done.position, done.damaged) == ("g", {})
    scene.check("--scrub")
    again = passes.read()
    assert again is not None
    assert again.finished == done.saved
    assert again.part < 0.2


def test_damage_that_a_killed_scrub_took_out_is_repaired_by_the_next(scene: Scene) -> None:
    rotten = in_order(MADE)[0]
    scene.check("--scrub")
    quarantine = scene.store.quarantine
    quarantine.mkdir(exist_ok=True)
    file = stored(scene.store, rotten)
    file.rename(quarantine / rotten.encoded)
    path = scene.store.root / "scrub.json"
    document = json.loads(path.read_bytes())
    document["damaged"] = {f"blobs/{rotten.encoded}": "its bytes are others"}
    path.write_text(json.dumps(document))
    found = [event["event"] for event in scene.check("--scrub", code=5)]
    assert "repaired" in found
    assert file.read_bytes() == rotten.data


@pytest.mark.parametrize("text", ["", "[]", '{"position": 7}', '{"position": "x"}', '{"a": 1}'])
def test_a_pass_whose_file_is_damaged_begins_anew(scene: Scene, text: str) -> None:
    (scene.store.root / "scrub.json").write_text(text)
    assert PassFile(scene.store, "scrub").read() is None
