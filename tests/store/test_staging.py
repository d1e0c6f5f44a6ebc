"""`pulls/`: one leader a blob, one owner a workspace, and the sweep of what they left."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.store.ingest import Ingest
from ociproxy.store.staging import Staging, remove_abandoned, stage, write_atomically
from ociproxy.store.store import Store
from tests.images import random_bytes

DATA = random_bytes(1000, seed="staging")
DIGEST = Digest.of(DATA)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def lead(store: Store) -> Ingest:
    ingest = store.staging.lead(DIGEST)
    assert ingest is not None
    return ingest


def receive(ingest: Ingest, start: int, stop: int) -> None:
    ingest.write(start, DATA[start:stop])
    ingest.arrived(start, stop, flush=True)


def staged(store: Store) -> list[str]:
    return sorted(path.name for path in store.staging.root.iterdir())


def test_only_one_leads_at_a_time(store: Store) -> None:
    first = lead(store)
    assert store.staging.lead(DIGEST) is None
    assert Store(store.root).staging.lead(DIGEST) is None
    first.close()
    lead(store).close()


def test_a_blob_without_a_leader_has_no_follower(store: Store) -> None:
    assert store.staging.follow(DIGEST) is None


def test_partitions_do_not_see_each_other_s_bytes(store: Store) -> None:
    one = store.staging.lead(DIGEST)
    other = store.staging.lead(DIGEST, "evil.example")
    assert one is not None
    assert other is not None
    assert not one.is_same_file(other)
    assert store.staging.lead(DIGEST, "evil.example") is None
    followed = store.staging.follow(DIGEST, "evil.example")
    assert followed is not None
    assert followed.is_same_file(other)
    for each in (one, other, followed):
        each.close()


def test_a_sweep_takes_what_is_old_and_without_a_leader(store: Store) -> None:
    first = lead(store)
    receive(first, 0, 10)
    led = store.staging.lead(Digest.of(b"led", "sha512"))
    assert led is not None
    led.set_size(300_000)
    (store.staging.root / "lone.spans").write_text("size 1\n")
    first.close()
    assert store.staging.sweep(time.time() - 3600) == 0
    assert store.staging.sweep(time.time() + 1) == 2
    assert staged(store) == [led.path.name, f"{led.path.name}.spans"]
    led.close()


def test_a_workspace_has_one_owner_at_a_time(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    first = staging.workspace("copy")
    assert first is not None
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert staging.workspace("copy") is None
    assert staging.workspace("other") is not None
    (first.path / "sub").mkdir()
    first.remove()
    assert not first.path.exists()
    second = staging.workspace("copy")
    assert second is not None
    assert list(second.path.iterdir()) == []


def test_what_a_dead_owner_left_in_a_workspace_goes_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "layer").write_bytes(b"left behind")
    workspace = Staging(tmp_path).workspace("copy")
    assert workspace is not None
    assert (workspace.path / "layer").read_bytes() == b"left behind"


def test_a_sweep_removes_workspaces_without_an_owner(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    owned = staging.workspace("owned")
    assert owned is not None
    (tmp_path / "abandoned" / "sub").mkdir(parents=True)
    (tmp_path / "fresh").mkdir()
    for name in ("owned", "abandoned"):
        os.utime(tmp_path / name, (1000, 1000))
    assert staging.sweep(2000) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "owned"]


def test_an_atomic_write_replaces_the_whole_file_for_everyone(tmp_path: Path) -> None:
    target, staging = tmp_path / "target", tmp_path / "staging"
    staging.mkdir()
    target.write_bytes(b"old and longer")
    with target.open("rb") as reader:
        write_atomically(target, b"new", staging=staging)
        assert reader.read() == b"old and longer"
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(staging.iterdir()) == []


def test_other_users_may_read_a_file_whatever_the_umask_of_the_process(store: Store) -> None:
    holder = ManifestHolder.of(b'{"layers": []}')
    before = os.umask(0o077)
    try:
        with store.publishing() as commit:
            store.manifests.put(holder, commit)
        commit.wait()
    finally:
        os.umask(before)
    path = store.root / "img" / holder.descriptor.digest.encoded
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_atomic_write_that_fails_leaves_nothing_staged(tmp_path: Path) -> None:
    target, staging = tmp_path / "target", tmp_path / "staging"
    staging.mkdir()
    (target / "in the way").mkdir(parents=True)
    with pytest.raises(StoreError) as caught:
        write_atomically(target, b"new", staging=staging)
    assert caught.value.path == target
    assert list(staging.iterdir()) == []


def test_what_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    """Another process begins an import, or a server starts, all the while."""
    staging = tmp_path / "pulls"
    staging.mkdir()
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            remove_abandoned(staging)

    sweepers = [threading.Thread(target=sweep) for _ in range(3)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for number in range(100):
            target = tmp_path / f"record-{number}"
            write_atomically(target, b"record", staging=staging)
            assert target.read_bytes() == b"record"
    finally:
        over.set()
        for sweeper in sweepers:
            sweeper.join()


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    held, mine = stage(tmp_path)
    file, left = stage(tmp_path)
    os.close(file)  # as the kernel does it
    (tmp_path / "other").touch()
    try:
        remove_abandoned(tmp_path)
    finally:
        os.close(held)
    assert mine.exists()
    assert not left.exists()
    assert (tmp_path / "other").exists()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_load_begins_though_a_file_goes_while_it_sweeps(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On a network file system, or FUSE, an open file may be gone: the last rename of a process
    that was killed comes late."""
    file, path = stage(store.staging.root)
    os.close(file)
    fstat = os.fstat

    def gone(file: int) -> os.stat_result:
        if os.path.samestat(fstat(file), path.stat()):
            raise OSError(code, os.strerror(code))
        return fstat(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", gone)
        with store.staging.using(time.time()):
            pass
    store.staging.sweep(time.time() + 1)
    assert list(store.staging.root.iterdir()) == []


def test_a_sweep_leaves_the_file_that_took_the_name_of_the_one_it_looked_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner ends, and another one begins, between the sweep's open and its lock."""
    root = store.staging.root
    path = root / ".preload-list"
    path.touch()
    os.utime(path, (1000, 1000))
    opened = os.open

    def open_late(name: Path, flags: int, *more: int) -> int:
        file = opened(name, flags, *more)
        if name == path and path.stat().st_mtime == 1000:
            path.unlink()
            path.write_bytes(b"new")
        return file

    monkeypatch.setattr(os, "open", open_late)
    store.staging.sweep(2000)
    assert path.read_bytes() == b"new"


def test_an_owner_notices_that_its_file_was_swept_between_its_open_and_its_lock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes would own one name."""
    digest = Digest.of(b"led")
    path = store.staging.root / digest.encoded
    path.touch()
    opened, looks = os.open, []

    def open_late(name: Path, flags: int, *more: int) -> int:
        file = opened(name, flags, *more)
        looks.append(name)
        if len(looks) == 1:
            path.unlink()
        return file

    monkeypatch.setattr(os, "open", open_late)
    first = store.staging.lead(digest)
    monkeypatch.undo()
    assert first is not None
    assert store.staging.lead(digest) is None
    first.close()
