"""Each file of a store hashed against its name, by threads that share one rate."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.damage import FileCheck
from ociproxy.store.store import Store
from tests.images import content, image, multi_platform, random_blob
from tests.stores import damage, put, stored

MADE = multi_platform("checked", layers=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    put(made, "quay.io/a/b:1", MADE)
    return made


def looked_at(store: Store, *, quick: bool = False, jobs: int = 2) -> FileCheck:
    files = FileCheck(store, quick=quick, jobs=jobs)
    files.run()
    return files


def flip_unseen(path: Path) -> None:
    """As a disk rots: no stat shows it."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_whole_store_is_read_once(store: Store) -> None:
    files = looked_at(store)
    assert (files.damaged, files.unsealed, files.strays) == ({}, set(), [])
    assert (files.blobs, files.manifests) == (len(MADE.blobs), len(MADE.manifests) + 1)
    assert files.read == files.size() == sum(each.size for each in MADE.all_content())


def test_rot_that_no_stat_shows_is_found_in_each_kind_of_file(store: Store) -> None:
    rotten = (MADE.top, MADE.manifests[1], MADE.layers[0])
    for each in rotten:
        flip_unseen(stored(store, each))
    found = looked_at(store).damaged
    assert {str(each.digest) for each in found.values()} == {each.digest for each in rotten}
    layer = found[f"blobs/{MADE.layers[0].encoded}"]
    wrong = Digest.of(stored(store, MADE.layers[0]).read_bytes())
    assert layer.reason == f"its bytes are those of {wrong}"


def test_quick_reads_no_blob_and_names_those_without_a_seal(store: Store) -> None:
    flip_unseen(stored(store, MADE.layers[0]))
    os.utime(stored(store, MADE.layers[1]))
    files = looked_at(store, quick=True)
    assert files.damaged == {}
    assert files.unsealed == {f"blobs/{MADE.layers[1].encoded}"}
    assert files.read == files.size() == sum(e.size for e in (MADE.top, *MADE.manifests))


def test_sha512_is_hashed_as_such(store: Store) -> None:
    blob = random_blob(1000, algorithm="sha512")
    path = store.blobs.path(Digest.parse(blob.digest))
    path.write_bytes(blob.data)
    assert looked_at(store).damaged == {}
    damage(path)
    [found] = looked_at(store).damaged.values()
    assert (found.file, str(found.digest)) == (f"blobs/sha512-{blob.encoded}", blob.digest)


def test_an_empty_file_after_a_power_cut_is_damaged(store: Store) -> None:
    stored(store, MADE.layers[0]).write_bytes(b"")
    stored(store, MADE.top).write_bytes(b"")
    assert len(looked_at(store).damaged) == 2


@pytest.mark.parametrize("data", [b"no JSON", b"[]", b"x" * (4 * 1024 * 1024 + 1)])
def test_what_is_no_manifest_is_damage_whatever_its_name(store: Store, data: bytes) -> None:
    name = content(data).encoded
    (store.root / "img" / name).write_bytes(data)
    assert list(looked_at(store).damaged) == [f"img/{name}"]


def test_names_that_are_no_digests_are_told_apart(store: Store) -> None:
    (store.root / "blobs" / "notes.txt").write_text("by hand")
    (store.root / "blobs" / ("sha256-" + "0" * 64)).write_text("two names for one digest")
    (store.root / "img" / ("0" * 64)).mkdir()
    files = looked_at(store)
    assert files.damaged == {}
    assert {path[:11] for path in files.strays} == {"blobs/notes", "blobs/sha25", "img/0000000"}


def test_reading_is_no_use(store: Store) -> None:
    """With relatime the kernel would take the first read in a day for one."""
    paths = [stored(store, each) for each in MADE.all_content()]
    for path in paths:
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    looked_at(store)
    assert {path.stat().st_atime_ns for path in paths} == {10**18}


def test_a_file_that_is_replaced_while_it_is_hashed_is_no_finding(store: Store) -> None:
    path = stored(store, MADE.layers[0])
    right = path.read_bytes()
    wrong = bytes(4_000_000)  # a moment to hash
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for data in (wrong, right):
                staged = store.staging.root / "staged"
                staged.write_bytes(data)
                staged.replace(path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(20):
            for found in looked_at(store).damaged.values():
                assert found.file == f"blobs/{path.name}"
    finally:
        stop.set()
        thread.join()
    path.write_bytes(right)
    assert looked_at(store).damaged == {}


def test_the_rate_holds_for_all_threads_together(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = image("rated", layers=8, layer_size=100_000)
    put(store, "quay.io/a/b:1", made)
    files = FileCheck(store, jobs=4, rate=1_000_000)
    began = time.monotonic()
    files.run()
    assert files.read > 800_000
    assert time.monotonic() - began > 0.6


def test_a_file_that_may_not_be_read_says_nothing_about_its_bytes(store: Store) -> None:
    """A link in a circle fails for root, too."""
    path = stored(store, MADE.layers[0])
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StoreError, match=path.name):
        looked_at(store)
