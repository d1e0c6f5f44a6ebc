"""Group commit: what is published together, in which order it reaches the disk, and failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Repository
from ociproxy.store import group_commit
from ociproxy.store.files import try_lock
from ociproxy.store.group_commit import PATIENCE
from ociproxy.store.store import Store
from tests.images import image, multi_platform
from tests.load.loading import Load
from tests.server import Mirror, upstream_entry
from tests.system_calls import Call, calls, traced
from tests.upstream import FakeUpstream

HERE = Repository("quay.io", "team/app")
NOW = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def holder(seed: str) -> ManifestHolder:
    made = image(seed).top
    return ManifestHolder.of(made.data, made.media_type)


def test_commits_that_gather_reach_the_disk_together_once_a_caller_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "_GATHER", 60.0)
    made: list[int] = []
    store.commits.made = lambda manifests: made.append(len(manifests))
    commits = []
    for seed in ("one", "two", "three"):
        with store.publishing(gathers=True) as commit:
            store.put_manifest(HERE, holder(seed), commit)
        commits.append(commit)
    assert made == []
    commits[0].wait()
    for each in commits:
        each.wait(0)
    assert made == [3]


def test_a_commit_that_does_not_gather_takes_along_those_that_do(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's does not wait for a load's."""
    monkeypatch.setattr(group_commit, "_GATHER", 60.0)
    with store.publishing(gathers=True) as gathering:
        store.put_manifest(HERE, holder("one"), gathering)
    with store.publishing() as commit:
        store.put_manifest(HERE, holder("two"), commit)
    for each in (commit, gathering):
        each.hand_over().result(PATIENCE)


def test_what_is_staged_is_found_by_its_process_at_once_and_by_others_when_it_is_published(
    store: Store,
) -> None:
    one = holder("one")
    digest = one.descriptor.digest
    other = Store(store.root)
    with store.publishing() as commit:
        store.put_manifest(HERE, one, commit)
        store.put_tag(HERE, "v1", one.descriptor, commit, now=NOW)
        assert store.manifests.find(digest) == one
        assert store.manifests.peek(digest) == one
        assert store.refs.find_manifest(HERE, digest) == one.descriptor
        record = store.refs.find_tag(HERE, "v1")
        assert record is not None
        assert record.descriptor == one.descriptor
        assert store.refs.tags(HERE) == ["v1"]
        assert store.refs.newest_manifests(HERE) == [digest]
        assert store.refs.has_repository(HERE)
        assert store.refs.manifests_state(HERE) is None
        assert other.refs.find_tag(HERE, "v1") is None
    commit.wait()
    for each in (store, other):
        assert each.manifests.find(digest) == one
        assert each.refs.tags(HERE) == ["v1"]
        assert each.refs.newest_manifests(HERE) == [digest]
    assert list(store.staging.root.iterdir()) == []
    assert not store.commits.pending


def test_an_error_on_the_way_publishes_nothing_and_leaves_nothing(store: Store) -> None:
    one = holder("one")
    with suppress(ZeroDivisionError), store.publishing() as commit:
        store.put_manifest(HERE, one, commit)
        raise ZeroDivisionError
    assert store.manifests.find(one.descriptor.digest) is None
    assert list(store.staging.root.iterdir()) == []


def test_a_record_that_finds_no_place_is_told_and_the_next_commit_works(store: Store) -> None:
    one = holder("one")
    (store.root / "refs" / "quay.io").write_bytes(b"in the way")
    with store.publishing() as commit:
        store.put_manifest(HERE, one, commit)
    with pytest.raises(StoreError, match=r"refs/quay\.io"):
        commit.wait()
    assert store.refs.find_manifest(HERE, one.descriptor.digest) is None
    (store.root / "refs" / "quay.io").unlink()
    store.commit_manifest(HERE, one)
    assert Store(store.root).refs.find_manifest(HERE, one.descriptor.digest) == one.descriptor
    assert list(store.staging.root.iterdir()) == []


def test_a_tag_takes_along_a_manifest_that_another_commit_has_only_staged(store: Store) -> None:
    one = holder("one")
    with suppress(ZeroDivisionError), store.publishing() as first:
        store.put_manifest(HERE, one, first)
        with store.publishing() as second:
            store.put_tag(HERE, "v1", one.descriptor, second, now=NOW)
        second.wait()
        raise ZeroDivisionError  # the first one is never published
    assert store.manifests.find(one.descriptor.digest) == one


def test_more_files_than_may_be_open_are_published_in_parts(store: Store) -> None:
    many = [ManifestHolder.of(b'{"layers":[],"n":%d}' % number) for number in range(150)]
    with store.publishing() as commit:
        for each in many:
            store.put_manifest(HERE, each, commit)
    commit.wait()
    assert len(Store(store.root).refs.manifests(HERE)) == 150
    assert list(store.staging.root.iterdir()) == []


def test_a_commit_in_parts_whose_first_part_fails_says_why_and_closes_its_files_once(
    store: Store,
) -> None:
    many = [ManifestHolder.of(b'{"layers":[],"n":%d}' % number) for number in range(150)]
    (store.root / "refs" / "quay.io").write_bytes(b"in the way")

    def put_all() -> None:
        with store.publishing() as commit:
            for each in many:
                store.put_manifest(HERE, each, commit)

    with pytest.raises(StoreError, match=r"refs/quay\.io"):
        put_all()
    assert list(store.staging.root.iterdir()) == []
    (store.root / "refs" / "quay.io").unlink()
    store.commit_manifest(HERE, many[0])


def test_a_file_that_cannot_be_closed_keeps_no_removal_waiting(store: Store) -> None:
    with store.publishing() as commit:
        store.put_manifest(HERE, holder("one"), commit)
        os.close(commit.manifests[0].file)
    with pytest.raises(StoreError):
        commit.wait()
    with (store.root / "locks" / "publishing").open() as file:
        assert try_lock(file.fileno())
    assert list(store.staging.root.iterdir()) == []
    assert not store.commits.pending


def test_nothing_is_removed_until_what_was_staged_has_its_name(store: Store) -> None:
    with store.publishing() as commit:
        store.put_manifest(HERE, holder("one"), commit)
        release = store.removals.prolong()
    commit.wait()
    with (store.root / "locks" / "publishing").open() as file:
        assert not try_lock(file.fileno())
        release()
        assert try_lock(file.fileno())


def test_settling_waits_for_what_was_handed_over_and_not_for_what_comes_after(store: Store) -> None:
    assert store.commits.settle(10)
    with store.publishing() as commit:
        store.put_manifest(HERE, holder("one"), commit)
    assert store.commits.settle(10)
    assert Store(store.root).refs.manifests(HERE) == [holder("one").descriptor.digest]
    assert list(store.staging.root.iterdir()) == []


def assert_in_order(
    found: Iterable[Call], store: Path, report: str, *, blobs_first: bool = True
) -> int:
    """Each name comes after its bytes, a record after the names of what it leads to, and the
    report after all names. Returns how many names there were."""
    flushed: set[str] = set()
    dirty: set[str] = set()
    contents = {f"{store}/{name}" for name in ("img", "fat")}
    names = 0
    reported = False
    for call in found:
        if call.name == "flush":
            flushed.add(call.paths[0])
            dirty.discard(call.paths[0])
        elif call.name == "mkdir" and call.paths[0].startswith(f"{store}/refs/"):
            dirty.add(str(Path(call.paths[0]).parent))
        elif call.name == "rename":
            staged, target = call.paths
            kind = Path(target).relative_to(store).parts[0]
            if kind == "store.json":
                continue
            names += 1
            assert staged in flushed, f"{target} has its name before its bytes"
            if kind in ("img", "fat") and blobs_first:
                assert f"{store}/blobs" not in dirty, f"{target} is there before its blobs"
            if kind in ("refs", "referrers"):
                assert not dirty & contents, f"{target} is there before its manifest"
            dirty.add(str(Path(target).parent))
        elif report in call.text:
            assert not dirty, f"reported before {dirty} were flushed"
            reported = True
    assert reported
    return names


def test_load_names_files_after_their_bytes_and_reports_an_image_after_all_names(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.add("team/app", multi_platform(), tag="v1")
    load = Load(tmp_path, upstream.url)
    reference = f"{upstream.registry}/team/app:v1"
    trace = tmp_path / "trace"
    command = load.command(load.write(reference), "--json", "--all-platforms")
    load.command = lambda *_: traced(command, trace)  # type: ignore[method-assign]
    done = load.run()
    assert done.code == 0, done.stderr
    assert assert_in_order(calls(trace), load.store, "team/app:v1") > 8


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_load_reports_no_image_that_the_disk_did_not_take(
    upstream: FakeUpstream, tmp_path: Path, call: str
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    load = Load(tmp_path, upstream.url)
    Store(load.store)
    listed = load.command(load.write(f"{upstream.registry}/team/app:v1"), "--json")
    load.command = lambda *_: traced(listed, tmp_path / "trace", f"{call}:error=EIO")  # type: ignore[method-assign]
    done = load.run()
    assert done.code == 4, (done.stdout, done.stderr)
    assert "input/output error" in done.stderr.lower()
    assert not done.events("loaded")
    store = Store(load.store)
    assert list(store.refs.repositories()) == []
    for folder in ("blobs", "img"):
        for path in (load.store / folder).iterdir():
            assert Digest.of(path.read_bytes()).encoded == path.name


def test_a_server_answers_before_the_disk_has_taken_it_and_keeps_it_all_the_same(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    trace = tmp_path / "trace"
    slow = "fdatasync:delay_enter=700000"
    started = mirror({"upstreams": [upstream_entry(upstream.url)]}, before=traced([], trace, slow))
    path = f"/v2/team/app/manifests/v1?ns={upstream.registry}"
    first = started.get(path)
    tags = list((started.store / "refs").rglob("v1"))
    second = started.get(path)
    assert (first.status, second.status, tags) == (200, 200, [])
    assert "hit" in second.cache_status
    assert len(upstream.seen("/manifests/")) == 1
    started.stop()
    assert_in_order(calls(trace), started.store, "listening", blobs_first=False)
    assert [each.name for each in (started.store / "refs").rglob("_tags/*")] == ["v1"]
