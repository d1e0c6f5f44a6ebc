"""`ociproxy check`: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ociproxy.store.store import Store
from tests.images import image, multi_platform, random_blob
from tests.parts.tools import read_only, run
from tests.server import ROOT, Mirror, upstream_entry
from tests.stores import damage, put, stored
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MADE = multi_platform("checked", layers=2)
REFERENCE = "quay.io/a/b:1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    put(made, REFERENCE, MADE)
    return made


def check(store: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    options = ["--image-path", str(store), *words]
    done = run(sys.executable, "-m", "ociproxy", "check", *options, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr.decode() + done.stdout.decode()
    return done


def said(store: Path, *words: str, code: int = 0) -> str:
    return check(store, *words, code=code).stderr.decode()


def events(store: Path, *words: str, code: int = 0) -> list[dict[str, Any]]:
    lines = check(store, "--json", *words, code=code).stdout.splitlines()
    return [json.loads(line) for line in lines]


def state(store: Path) -> dict[str, tuple[int, int, int]]:
    """Times and size of each file; a kernel with relatime would change the first one."""
    folders = ("blobs", "fat", "img")
    found = {path: path.stat() for folder in folders for path in (store / folder).iterdir()}
    return {str(p): (s.st_atime_ns, s.st_mtime_ns, s.st_size) for p, s in found.items()}


def test_a_whole_store_is_one_line_and_stays_as_it_is(store: Store) -> None:
    for each in MADE.all_content():
        path = stored(store, each)
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    before = state(store.root)
    [line] = said(store.root).splitlines()
    counts = f"{len(MADE.blobs)} blobs, {len(MADE.manifests) + 1} manifests, 1 image"
    assert line.startswith(f"all is whole. {counts}; read ")
    assert state(store.root) == before


def test_a_damaged_layer_is_named_with_its_file_and_its_images(store: Store) -> None:
    damage(stored(store, MADE.layers[0]))
    lines = said(store.root, code=5).splitlines()
    file = f"blobs/{MADE.layers[0].encoded}"
    assert lines[0].startswith(f"damaged {file}: its bytes are those of sha256:")
    assert lines[0].endswith(f"needed by {REFERENCE}")
    assert lines[1] == f"damaged {REFERENCE}@{MADE.digest}:"
    assert lines[2] == f"  {MADE.layers[0].digest} ({file} is damaged)"
    assert lines[3].startswith("damaged files: 1; damaged images: 1. ")


def test_a_missing_config_exits_with_3(store: Store) -> None:
    config = MADE.blobs[0]
    stored(store, config).unlink()
    lines = said(store.root, code=3).splitlines()
    assert lines[0] == f"incomplete {REFERENCE}@{MADE.digest}:"
    assert lines[1] == f"  {config.digest} (config not stored)"


def test_damage_outweighs_what_is_missing(store: Store) -> None:
    other = image("other")
    put(store, "quay.io/other:1", other)
    stored(store, other.top).unlink()
    damage(stored(store, MADE.layers[0]))
    text = said(store.root, code=5)
    assert "damaged files: 1; damaged images: 1; incomplete images: 1. " in text


def test_json_says_the_same(store: Store) -> None:
    layer = MADE.layers[0]
    damage(stored(store, layer))
    (store.root / "refs/quay.io/a/b/_tags/broken").write_text("{")
    file, broken, record, done = events(store.root, code=5)
    assert (file["event"], file["digest"], file["images"]) == ("damaged", layer.digest, [REFERENCE])
    assert (store.root / file["file"]) == stored(store, layer)
    assert (broken["event"], broken["reference"], broken["digest"], broken["status"]) == (
        "image",
        REFERENCE,
        MADE.digest,
        "damaged",
    )
    [problem] = broken["problems"]
    assert (problem["digest"], problem["damaged"], problem["file"]) == (
        layer.digest,
        True,
        file["file"],
    )
    assert (record["event"], record["file"], record["damaged"]) == (
        "record",
        "refs/quay.io/a/b/_tags/broken",
        True,
    )
    assert done["event"] == "done"
    assert done["found"] == {"damaged files": 1, "damaged images": 1, "damaged records": 1}
    assert done["bytes"] == sum(each.size for each in MADE.all_content())


def test_quick_names_the_blobs_without_a_seal_and_exits_with_0(store: Store) -> None:
    for blob in MADE.blobs:
        os.utime(stored(store, blob))
    text = said(store.root, "--quick")
    assert text.count("has no seal") == min(len(MADE.blobs), 10)
    assert f"unsealed files: {len(MADE.blobs)}. " in text
    unsealed = [each for each in events(store.root, "--quick") if each["event"] == "unsealed"]
    assert len(unsealed) == len(MADE.blobs)
    assert said(store.root).startswith("all is whole")


def test_a_read_only_store_is_checked(store: Store) -> None:
    damage(stored(store, MADE.layers[0]))
    with read_only(store.root):
        assert "damaged files: 1" in said(store.root, code=5)


def test_what_is_no_store_is_one_line(tmp_path: Path) -> None:
    assert "has no store.json" in said(tmp_path, code=4)


def test_an_interruption_says_what_was_found_till_then(store: Store) -> None:
    blob = random_blob(4_000_000)
    (store.root / "blobs" / blob.encoded).write_bytes(blob.data)
    command = [sys.executable, "-m", "ociproxy", "check", "--image-path", str(store.root)]
    working = subprocess.Popen([*command, "--rate", "100K"], stderr=subprocess.PIPE, cwd=ROOT)
    time.sleep(2)  # the check would take 40 s
    working.send_signal(signal.SIGTERM)
    _, text = working.communicate(timeout=30)
    assert working.returncode == 130
    assert b"interrupted before all was looked at" in text


def test_beside_a_server_that_fills_nothing_is_found(
    mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    slow = image("slow", layers=2, layer_size=300_000)
    upstream.add("slow", slow, tag="1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    held = slow.layers[0]
    upstream.fault(f"/blobs/{held.digest}", Fault(stall_after=100_000))
    server.manifest(upstream.registry, "slow", "1")
    server.wait_for_file(f"pulls/{held.encoded}")
    server.wait_for_file(f"blobs/{slow.layers[1].encoded}")
    server.wait_for_file(f"blobs/{slow.blobs[0].encoded}")
    *found, done = events(server.store)
    assert (found, done["found"]) == ([], {"arriving images": 1})
    upstream.release()
