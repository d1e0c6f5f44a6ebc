"""About how large the store is, as all of its processes count it together."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from ociproxy.store.usage import Usage, UsageFile
from tests.images import image, random_blob
from tests.stores import promised_to_a_killed_process, put


def add_many(path: Path) -> None:
    usage = UsageFile(path)
    for _ in range(200):
        usage.add(1)
    while usage._pending:  # the last ones met the other process
        usage.add(0)


def test_several_processes_count_what_they_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    path = tmp_path / "locks/usage"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(path,)) for _ in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(20)
    usage = store.usage.read()
    assert usage is not None
    assert (usage.stored, usage.written) == (400, 400)


def test_blobs_and_manifests_are_counted_and_what_came_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "quay.io/a/b:v1", image("before"))
    assert store.usage.read() is None  # a store without limits is not counted
    store.usage.record(0, Usage(), freed=0, stuck=False)
    before = store.usage.read()
    made = image("meanwhile")
    put(store, "quay.io/a/b:v2", made)
    size = sum(each.size for each in made.all_content())
    usage = store.usage.read()
    assert usage is not None
    assert before is not None
    assert usage.stored == size
    store.usage.record(5000, before, freed=0)
    usage = store.usage.read()
    assert usage is not None
    assert usage.stored == 5000 + size


def test_a_manifest_counts_once_and_not_before_it_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    here = Reference.parse("quay.io/a/b:v1").repository
    one, other = (ManifestHolder.of(b'{"layers":[],"n":%d}' % number) for number in (1, 2))

    def stored() -> int:
        return (store.usage.read() or Usage()).stored

    with store.publishing() as commit:
        store.put_manifest(here, one, commit)
        Path(commit.manifests[0].path).unlink()  # so it gets no name
    with pytest.raises(StoreError):
        commit.wait()
    assert stored() == 0
    with store.publishing() as first, store.publishing() as second:
        for commit in (first, second):
            store.put_manifest(here, other, commit)
    for commit in (first, second):
        commit.wait()
    assert stored() == len(other.raw)


def test_a_promise_outlives_a_count_so_that_others_do_not_get_the_same_room(
    tmp_path: Path,
) -> None:
    usage = Store(tmp_path).usage
    usage.record(0, Usage(), freed=0, stuck=False)
    assert usage.reserve(60, 100)
    assert not usage.reserve(60, 100)
    usage.record(0, Usage(), freed=0, stuck=False)
    other = Store(tmp_path).usage
    assert not other.reserve(60, 100)
    assert other.reserve(30, 100)
    assert usage.promised() == 90
    usage.release(60)
    assert (usage.read() or Usage()).reserved == 30
    other.release(30)
    assert (usage.read() or Usage()).reserved == 0
    assert not list((tmp_path / "locks").glob("promised-*"))


def test_a_count_ends_the_promise_of_a_killed_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    promised_to_a_killed_process(store, 700)
    assert not store.usage.reserve(400, 1000)
    assert store.usage.promised() == 0
    store.usage.record(0, Usage(), freed=0, stuck=False, began=time.time() + 2)
    assert store.usage.reserve(400, 1000)


def test_a_blob_that_is_renamed_but_not_added_by_a_killed_process_is_counted(
    tmp_path: Path,
) -> None:
    """Which happens while the store is counted, after the look at its files."""
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    began = time.time()
    promised_to_a_killed_process(store, 700)
    store.usage.record(0, Usage(), freed=0, stuck=False, began=began)  # it saw no such file
    assert not store.usage.reserve(400, 1000)
    # The next one sees the file, and no promise besides.
    store.usage.record(700, Usage(), freed=0, stuck=False, began=time.time() + 2)
    usage = store.usage.read() or Usage()
    assert (usage.stored, usage.reserved) == (700, 0)


def test_room_is_given_back_together_with_what_could_not_be_added(tmp_path: Path) -> None:
    """Another process has the file while the blob is added, and not any more soon after."""
    usage = Store(tmp_path).usage
    usage.record(0, Usage(), freed=0, stuck=False)
    assert usage.reserve(60, 100)
    with (tmp_path / "locks/usage").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        usage.add(60)
    usage.release(60)
    found = usage.read() or Usage()
    assert (found.stored, found.reserved) == (60, 0)
    with (tmp_path / "locks/usage").open() as file:
        assert usage.reserve(30, 100)
        fcntl.flock(file, fcntl.LOCK_EX)
        usage.add(30)
        usage.release(30)
    assert usage.promised() == 30  # so no other process gets the room
    usage.add(0)
    found = usage.read() or Usage()
    assert (found.stored, found.reserved, usage.promised()) == (90, 0, 0)


def test_a_file_of_an_older_version_knows_of_no_pins(tmp_path: Path) -> None:
    usage = Store(tmp_path).usage
    usage.record(10, Usage(), freed=0, stuck=False, pinned=7)
    usage.record(10, Usage(), freed=0)  # by a prune that looks at no limits
    path = tmp_path / "locks/usage"
    written = json.loads(path.read_bytes())
    assert written.pop("pinned") == 7
    path.write_text(json.dumps(written))
    assert usage.read() == replace(Usage(**written), pinned=0)
    usage.record(10, Usage(), freed=0)
    assert path.stat().st_size == 512
    assert len(json.dumps({each.name: 10**18 for each in fields(Usage)})) < 512


def test_a_damaged_file_is_one_that_says_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(10, Usage(), freed=0, stuck=False)
    for data in (b"\0" * 512, b"[1]", b'{"stored": "many"}', b'{"unknown": 1}', b'{"stored": -1}'):
        (tmp_path / "locks/usage").write_bytes(data)
        assert store.usage.read() is None
    blob = random_blob(7)
    store.commit_config(Digest.parse(blob.digest), blob.data)
    usage = store.usage.read()
    assert usage is not None
    assert (usage.stored, usage.counted) == (7, 0.0)  # not counted: a server has it counted
