"""`ociproxy list`: what a store holds that a mirror has filled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests.images import Image, image, multi_platform
from tests.parts.tools import run
from tests.server import ROOT, Mirror, upstream_entry
from tests.stores import put, record_tag
from tests.upstream import FakeUpstream

WHOLE, PARTIAL = multi_platform("whole"), image("partial", layers=2)


def list_store(store: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    options = ["--image-path", str(store), *words]
    done = run(sys.executable, "-m", "ociproxy", "list", *options, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def filled(mirror: Callable[..., Mirror], upstream: FakeUpstream) -> Path:
    """One index of which one platform was pulled, and an image with a layer that never came."""
    upstream.add("team/whole", WHOLE, tag="v1")
    upstream.add("partial", PARTIAL, tag="Mixed.Case")
    upstream.remove("partial", PARTIAL.layers[1].digest)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.manifest(upstream.registry, "team/whole", "v1")
    child = WHOLE.manifests[1]
    server.manifest(upstream.registry, "team/whole", child.digest)
    server.manifest(upstream.registry, "partial", "Mixed.Case")
    for blob in blobs_of(WHOLE, child.digest):
        server.wait_for_file(f"blobs/{blob}")
    server.wait_for_file(f"blobs/{PARTIAL.layers[0].encoded}")
    server.stop()
    return server.store


def blobs_of(made: Image, child: str) -> list[str]:
    [manifest] = [each.json() for each in made.manifests if each.digest == child]
    wanted = [manifest["config"], *manifest["layers"]]
    return [each["digest"].partition(":")[2] for each in wanted]


def entries_of(store: Path, *words: str) -> dict[str, Any]:
    listed = json.loads(list_store(store, "--format", "json", *words).stdout)
    return {entry["reference"].partition("/")[2]: entry for entry in listed}


def test_a_pipe_gets_whole_references_and_no_escapes(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # is no terminal
    monkeypatch.setenv("COLUMNS", "40")
    listed = list_store(filled).stdout.decode()
    assert "\x1b" not in listed
    assert "/partial:Mixed.Case " in listed


def test_json_says_what_is_there_and_what_is_not(filled: Path) -> None:
    entries = entries_of(filled)
    assert list(entries) == ["partial:Mixed.Case", "team/whole:v1"]
    whole, partial = entries["team/whole:v1"], entries["partial:Mixed.Case"]
    assert (whole["digest"], whole["complete"]) == (WHOLE.digest, True)
    [platform] = whole["platforms"]
    assert (platform["platform"], platform["digest"]) == ("linux/arm64", WHOLE.manifests[1].digest)
    stored = [WHOLE.top.size, WHOLE.manifests[1].size]
    stored += [(filled / "blobs" / n).stat().st_size for n in blobs_of(WHOLE, platform["digest"])]
    assert whole["size"] == sum(stored)
    assert (partial["digest"], partial["complete"]) == (PARTIAL.digest, False)
    for entry in entries.values():
        for key in ("resolved", "lastUsed"):
            age = datetime.now(UTC) - datetime.fromisoformat(entry[key])
            assert timedelta(minutes=-1) < age < timedelta(minutes=5)


def test_refs_are_one_reference_a_line(filled: Path, upstream: FakeUpstream) -> None:
    lines = list_store(filled, "--format", "refs").stdout.decode().splitlines()
    names = ("partial:Mixed.Case", "team/whole:v1")
    assert lines == [f"{upstream.registry}/{name}" for name in names]


def test_the_table_never_cuts_a_reference(filled: Path, upstream: FakeUpstream) -> None:
    head, partial, whole = list_store(filled).stdout.decode().splitlines()
    assert head.split()[:5] == ["REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "COMPLETE"]
    assert f"{upstream.registry}/team/whole:v1" in whole
    assert WHOLE.digest[:19] in whole
    assert "linux/arm64" in whole
    assert " yes " in whole
    assert " not linux/amd64 " in partial


def test_patterns_choose(filled: Path) -> None:
    assert list(entries_of(filled, "*/team/*")) == ["team/whole:v1"]
    assert list(entries_of(filled, "*:Mixed.*", "*:v1")) == ["partial:Mixed.Case", "team/whole:v1"]
    assert entries_of(filled, "nothing*") == {}


def test_a_pattern_may_be_a_name_as_in_a_list(filled: Path, upstream: FakeUpstream) -> None:
    registry = upstream.registry
    assert list(entries_of(filled, f"{registry}/team/whole")) == ["team/whole:v1"]
    assert list(entries_of(filled, f"{registry}/team/whole:v1")) == ["team/whole:v1"]
    assert entries_of(filled, f"{registry}/team/whole:v2") == {}
    said = list_store(filled, "nginx", f"{registry}/team/whole").stderr.decode()
    assert said.splitlines()[-1] == "nothing matches 'nginx'"


def test_the_table_has_a_total_that_counts_what_is_shared_once(filled: Path) -> None:
    store = Store(filled)
    entry = entries_of(filled)["team/whole:v1"]
    twin = Reference.parse("other.example/team/whole:v2")
    holder = store.manifests.find(Digest.parse(entry["digest"]))
    assert holder is not None
    record_tag(store, twin.repository, "v2", holder.descriptor, now=0.0)
    said = list_store(filled, "*/team/whole:*").stderr.decode()
    assert said.splitlines()[0] == f"2 images: {decimal(entry['size'])} in different contents"


@pytest.mark.parametrize("kind", ["tar", "zstd", "folder"])
def test_an_archive_is_looked_into(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "store")
    put(store, "quay.io/team/whole:v1", WHOLE)
    put(store, "quay.io/team/one:v1", image("one", layer_size=70_000))
    file = tmp_path / ("a.tar.zst" if kind == "zstd" else "a.tar")
    words = ["export", str(file), "--image-path", str(store.root)]
    run(sys.executable, "-m", "ociproxy", *words, *(["--zstd"] if kind == "zstd" else []), cwd=ROOT)
    if kind == "folder":
        (tmp_path / "layout").mkdir()
        run("tar", "-xf", str(file), "-C", str(tmp_path / "layout"))
        file = tmp_path / "layout"
    none = tmp_path / "none"
    done = list_store(none, str(file), "--format", "json")
    ours = list_store(store.root, "--format", "json")
    mine, theirs = json.loads(ours.stdout), json.loads(done.stdout)
    for entry in (*mine, *theirs):
        del entry["resolved"], entry["lastUsed"]
    assert theirs == mine
    assert "2 images: " in list_store(none, str(file)).stderr.decode()
    assert not none.exists()
    assert list(
        json.loads(list_store(none, str(file), "quay.io/team/one", "--format", "json").stdout)
    )


def test_listing_is_no_use_and_changes_nothing(filled: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted(filled.rglob("*")):
            stat = path.stat()
            found[str(path)] = (stat.st_mtime_ns, stat.st_size)
        return found

    before = state()
    list_store(filled)
    assert state() == before


def test_an_empty_store_and_none(tmp_path: Path) -> None:
    Store(tmp_path / "empty")
    assert json.loads(list_store(tmp_path / "empty", "--format", "json").stdout) == []
    done = list_store(tmp_path / "none", code=4)
    [line] = done.stderr.decode().splitlines()
    assert str(tmp_path / "none") in line


@pytest.mark.parametrize("command", [["list"], ["export", "{folder}/a.tar"]])
def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path, command: list[str]) -> None:
    words = [word.format(folder=tmp_path) for word in command]
    done = run(
        sys.executable, "-m", "ociproxy", *words, "--image-path", tmp_path, check=False, cwd=ROOT
    )
    assert done.returncode == 4
    assert b"no store" in done.stderr
    assert list(tmp_path.iterdir()) == []
