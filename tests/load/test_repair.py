"""`ociproxy check --repair`: what was damaged or lost is there again, and nothing good is gone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import Image, artifact, image, multi_platform
from tests.parts.tools import read_only, run
from tests.server import ROOT, Mirror, upstream_entry
from tests.stores import damage, put, stored
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MADE, OTHER = multi_platform("mended", layers=2), image("other", layers=3)


class Scene:
    """A store with two images whose upstream has them, too."""

    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        self.config = folder / "config.yaml"
        entry = upstream_entry(upstream.url)
        self.config.write_text(yaml.safe_dump({"upstreams": [entry]}), encoding="utf-8")
        self.store = Store(folder / "store")
        self.add("app", MADE)
        self.add("other", OTHER)

    def add(self, name: str, made: Image, tag: str = "1") -> None:
        self.upstream.add(name, made, tag=tag)
        put(self.store, self.reference(name, tag), made)

    def reference(self, name: str, tag: str = "1") -> str:
        return f"{self.upstream.registry}/{name}:{tag}"

    def command(self, *words: str) -> list[str]:
        where = ["--image-path", str(self.store.root), "--config-path", str(self.config)]
        return [sys.executable, "-m", "ociproxy", "check", *where, *words]

    def check(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        done = run(*self.command("--json", *words), check=False, cwd=ROOT)
        assert done.returncode == code, done.stderr.decode() + done.stdout.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]

    def repair(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        return self.check("--repair", *words, code=code)

    def quarantined(self) -> set[str]:
        folder = self.store.quarantine
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def scene(tmp_path: Path, upstream: FakeUpstream) -> Scene:
    return Scene(tmp_path, upstream)


def named(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in events if each["event"] == kind]


def rot(path: Path) -> bytes:
    """Flip a byte that no stat shows. Returns the damaged bytes."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path.read_bytes()


def test_nothing_is_asked_for_a_whole_store(scene: Scene) -> None:
    [done] = scene.repair()
    assert done["left"] == "all is whole now"
    assert scene.upstream.seen() == []


def test_damaged_blobs_and_manifests_are_fetched_again(scene: Scene) -> None:
    parts = (MADE.layers[0], MADE.blobs[0], MADE.manifests[1], OTHER.top)
    rotten = {each.encoded: rot(stored(scene.store, each)) for each in parts}
    events = scene.repair()
    assert {each["reference"] for each in named(events, "repaired")} == {
        scene.reference("app"),
        scene.reference("other"),
    }
    for each in parts:
        assert stored(scene.store, each).read_bytes() == each.data
        assert (scene.store.quarantine / each.encoded).read_bytes() == rotten[each.encoded]
    scene.check()
    gets = [each.path for each in scene.upstream.seen(method="GET") if "/v2/app/" in each.path]
    assert len(gets) == 3  # what was damaged, and nothing else


@pytest.mark.parametrize("harm", [rot, Path.unlink])
def test_the_platforms_that_were_never_stored_are_not_fetched(
    scene: Scene, harm: Callable[[Path], object]
) -> None:
    """The only stored manifest of an index is damaged or lost."""
    records = scene.store.root / "refs" / scene.reference("app").rpartition(":")[0] / "_manifests"
    for other in MADE.manifests[1:]:
        stored(scene.store, other).unlink()
        (records / other.digest).unlink()
    harm(stored(scene.store, MADE.manifests[0]))
    assert [each["reference"] for each in named(scene.repair(), "repaired")] == [
        scene.reference("app")
    ]
    assert not any(scene.upstream.count(other.digest) for other in MADE.manifests[1:])
    scene.check()


def test_a_manifest_that_came_back_brings_what_it_needs(scene: Scene) -> None:
    for each in (*MADE.manifests, MADE.top, *MADE.blobs):
        stored(scene.store, each).unlink()
    scene.repair()
    scene.check()
    # Of an index the children that the store had are not known: those of all platforms come.
    assert stored(scene.store, MADE.top).read_bytes() == MADE.top.data


def test_the_digest_that_a_tag_had_is_fetched_though_the_tag_has_moved(scene: Scene) -> None:
    scene.upstream.add("other", image("newer"), tag="1")
    rot(stored(scene.store, OTHER.layers[0]))
    scene.repair()
    assert stored(scene.store, OTHER.layers[0]).read_bytes() == OTHER.layers[0].data
    record = json.loads(
        (scene.store.root / "refs" / scene.upstream.registry / "other/_tags/1").read_text()
    )
    assert record["descriptor"]["digest"] == OTHER.digest


def test_offline_what_is_damaged_is_taken_out_and_its_names_stay(scene: Scene) -> None:
    rot(stored(scene.store, MADE.layers[0]))
    rot(stored(scene.store, OTHER.top))
    events = scene.repair("--offline", code=3)
    assert {each["reason"] for each in named(events, "failed")} == {"no upstream may be asked"}
    assert scene.upstream.seen() == []
    assert scene.quarantined() == {MADE.layers[0].encoded, OTHER.top.encoded}
    scene.repair()  # and with an upstream they are whole again
    scene.check()


def test_a_tag_that_leads_nowhere_is_removed_and_named(scene: Scene) -> None:
    gone = image("gone")
    put(scene.store, scene.reference("gone"), gone)
    stored(scene.store, gone.top).unlink()
    events = scene.repair()
    files = {each["file"] for each in named(events, "removed")}
    folder = f"refs/{scene.upstream.registry}/gone"
    assert files == {f"{folder}/_tags/1", f"{folder}/_manifests/{gone.digest}"}
    assert not any((scene.store.root / each).exists() for each in files)
    scene.check()
    assert stored(scene.store, gone.layers[0]).read_bytes() == gone.layers[0].data


def test_beside_a_prune_no_record_is_removed(scene: Scene) -> None:
    gone = image("gone")
    put(scene.store, scene.reference("gone"), gone)
    stored(scene.store, gone.top).unlink()
    with scene.store.removals.remover():
        events = scene.repair(code=3)
    assert "2 records stay" in named(events, "busy")[0]["reason"]
    scene.repair()
    scene.check()


def test_an_upstream_that_does_not_answer_costs_no_name(scene: Scene) -> None:
    stored(scene.store, OTHER.top).unlink()
    scene.upstream.fault("/v2/other/manifests", Fault(status=403))
    [failed] = named(scene.repair(code=3), "failed")
    assert failed["reference"] == scene.reference("other")
    scene.upstream.heal()
    scene.repair()
    scene.check()


def test_what_the_upstream_lacks_is_left_and_the_rest_comes(scene: Scene) -> None:
    lost, found = OTHER.layers[0], OTHER.layers[1]
    for each in (lost, found):
        rot(stored(scene.store, each))
    scene.upstream.remove("other", lost.digest)
    events = scene.repair(code=3)
    [failed] = named(events, "failed")
    assert lost.digest in failed["reason"]
    assert stored(scene.store, found).read_bytes() == found.data
    assert lost.encoded in scene.quarantined()


def test_wrong_bytes_from_the_upstream_heal_nothing(scene: Scene) -> None:
    layer = OTHER.layers[0]
    rot(stored(scene.store, layer))
    scene.upstream.fault(f"/blobs/{layer.digest}", Fault(flip_at=3))
    [failed] = named(scene.repair(code=3), "failed")
    assert layer.digest in failed["reason"]
    assert not scene.store.blobs.path(Digest.parse(layer.digest)).exists()


def test_damaged_records_are_set_aside_or_written_anew(scene: Scene) -> None:
    bill = artifact(OTHER.top)
    put(scene.store, f"{scene.upstream.registry}/other@{bill.digest}", bill)
    folder = scene.store.root / "refs" / scene.upstream.registry / "other"
    records = {
        "tag": folder / "_tags" / "broken",
        "manifest": folder / "_manifests" / OTHER.digest,
        "referrer": scene.store.root / "referrers" / OTHER.digest / bill.digest,
    }
    for path in records.values():
        path.write_text("{")
    assert len(named(scene.repair(), "removed")) == 3
    assert not records["tag"].exists()
    for kind in ("manifest", "referrer"):
        assert json.loads(records[kind].read_text())["digest"] == records[kind].name
    assert len(scene.quarantined()) == 3
    scene.check()


def test_a_read_only_store_is_one_line(scene: Scene) -> None:
    rot(stored(scene.store, OTHER.top))
    with read_only(scene.store.root):
        done = run(*scene.command("--repair"), check=False, cwd=ROOT)
    assert done.returncode == 4
    assert b"read-only" in done.stderr


def test_no_client_gets_rotten_bytes_as_whole_ones_once_the_repair_has_ended(
    scene: Scene, mirror: Callable[..., Mirror]
) -> None:
    """Clients ask all the time. What began before may be wrong: no stat shows the rot."""
    entry = upstream_entry(scene.upstream.url)
    server = mirror({"upstreams": [entry]}, store=scene.store.root)
    layer = OTHER.layers[0]
    rot(stored(scene.store, layer))
    bodies: list[tuple[float, int, bytes]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            began = time.monotonic()
            answer = server.blob(scene.upstream.registry, "other", layer.digest)
            bodies.append((began, answer.status, answer.body))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        scene.repair()
        repaired = time.monotonic()
        server.wait_for(lambda: any(began > repaired for began, _, _ in bodies))
    finally:
        stop.set()
        thread.join()
    assert {status for _, status, _ in bodies} == {200}
    assert {body for began, _, body in bodies if began > repaired} == {layer.data}


def test_after_a_kill_at_any_time_nothing_good_is_gone(scene: Scene) -> None:
    chance = random.Random(20261129)  # reproducible, not secret
    everything = {each.digest: each for made in (MADE, OTHER) for each in made.all_content()}
    for number in range(5):
        rotten = chance.sample(sorted(everything), 4)
        for digest in rotten:
            path = stored(scene.store, everything[digest])
            path.write_bytes(b"\0" + path.read_bytes()[1:] if number % 2 else b"")
        scene.upstream.fault("/blobs/", Fault(rate=40_000))
        repairing = subprocess.Popen(scene.command("--repair"), stderr=subprocess.DEVNULL, cwd=ROOT)
        time.sleep(chance.uniform(0.3, 2.5))
        repairing.send_signal(signal.SIGKILL)
        repairing.wait()
        scene.upstream.heal()
        for digest in everything.keys() - set(rotten):
            assert stored(scene.store, everything[digest]).read_bytes() == everything[digest].data
        scene.repair()
        for each in everything.values():
            assert stored(scene.store, each).read_bytes() == each.data
    scene.check()


def test_a_signal_ends_a_repair_that_waits(scene: Scene) -> None:
    layer = OTHER.layers[0]
    rot(stored(scene.store, layer))
    scene.upstream.fault(f"/blobs/{layer.digest}", Fault(stall_after=10))
    repairing = subprocess.Popen(scene.command("--repair"), stderr=subprocess.PIPE, cwd=ROOT)
    end = time.monotonic() + 30
    while not scene.upstream.count(f"/blobs/{layer.digest}", "GET"):
        assert time.monotonic() < end
        time.sleep(0.05)
    repairing.send_signal(signal.SIGTERM)
    _, said = repairing.communicate(timeout=30)
    assert repairing.returncode == 130
    assert b"interrupted" in said
    scene.upstream.heal()
    scene.repair()
    scene.check()
