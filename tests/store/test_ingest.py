"""An arriving blob: its journal, its followers, and what a crash leaves behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociproxy.errors import StoreFull
from ociproxy.oci.digest import Digest
from ociproxy.store.files import Silence
from ociproxy.store.ingest import Ingest
from ociproxy.store.store import Store
from tests.images import random_bytes

DATA = random_bytes(300_000, seed="staging")
"""Longer than a short blob, which has no journal."""
DIGEST = Digest.of(DATA)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def leader(store: Store) -> Iterator[Ingest]:
    ingest = lead(store)
    yield ingest
    ingest.close()


def lead(store: Store) -> Ingest:
    ingest = store.staging.lead(DIGEST)
    assert ingest is not None
    return ingest


def follow(store: Store) -> Ingest:
    ingest = store.staging.follow(DIGEST)
    assert ingest is not None
    return ingest


def receive(ingest: Ingest, start: int, stop: int) -> None:
    ingest.write(start, DATA[start:stop])
    ingest.arrived(start, stop, flush=True)


def staged(store: Store) -> list[str]:
    return sorted(path.name for path in store.staging.root.iterdir())


def test_a_follower_sees_what_arrived_and_whether_it_is_led(store: Store) -> None:
    leader, follower = lead(store), follow(store)
    follower.refresh()
    assert (follower.size, follower.ranges.total) == (None, 0)
    leader.set_size(len(DATA))
    receive(leader, 500, 700)
    receive(leader, 0, 100)
    follower.refresh()
    assert follower.size == len(DATA)
    assert list(follower.ranges) == [(0, 100), (500, 700)]
    assert os.pread(follower.file, 200, 500) == DATA[500:700]
    assert follower.is_same_file(leader)
    assert follower.is_led()
    leader.close()
    assert not follower.is_led()
    follower.close()


def test_a_follower_takes_no_half_line_and_no_nonsense(store: Store, leader: Ingest) -> None:
    leader.write(0, DATA)
    follower = follow(store)
    journal = store.staging.root / f"{DIGEST.encoded}.spans"
    journal.write_bytes(b"size 1000\nsize\n1 2 3\n-1 5\n\xff\xfe 9\nsize x\n0 10\n20 3")
    follower.refresh()
    assert (follower.size, list(follower.ranges)) == (1000, [(0, 10)])
    with journal.open("ab") as file:
        file.write(b"0\n")
    follower.refresh()
    assert list(follower.ranges) == [(0, 10), (20, 30)]
    follower.close()


def test_the_next_leader_goes_on_where_the_last_one_stopped(store: Store) -> None:
    first = lead(store)
    first.set_size(len(DATA))
    receive(first, 0, 400)
    first.close()
    second = lead(Store(store.root))
    assert (second.size, list(second.ranges)) == (len(DATA), [(0, 400)])
    receive(second, 400, len(DATA))
    second.commit(store.blobs.commit)
    second.close()
    assert store.blobs.path(DIGEST).read_bytes() == DATA
    assert staged(store) == []


def test_a_blob_that_is_known_to_be_short_has_no_journal_and_is_fetched_anew(store: Store) -> None:
    first = lead(store)
    first.set_size(1000)
    receive(first, 0, 400)
    assert staged(store) == [DIGEST.encoded]
    first.close()
    second = lead(store)
    assert (second.size, list(second.ranges)) == (None, [])
    second.set_size(len(DATA))  # the upstream told a wrong one
    receive(second, 0, 400)
    assert staged(store) == [DIGEST.encoded, f"{DIGEST.encoded}.spans"]
    second.discard()
    second.close()


def test_what_the_journal_did_not_have_yet_is_written_at_the_end(store: Store) -> None:
    first = lead(store)
    for start in range(0, 900, 100):
        first.write(start, DATA[start : start + 100])
        first.arrived(start, start + 100)
    first.close()
    second = lead(store)
    assert list(second.ranges) == [(0, 900)]
    second.discard()
    second.close()
    assert staged(store) == []


def test_a_journal_that_claims_more_than_the_file_holds_is_cut(store: Store) -> None:
    first = lead(store)
    receive(first, 0, 300)
    first.arrived(300, 900, flush=True)
    first.close()
    second = lead(store)
    assert list(second.ranges) == [(0, 300)]
    second.close()


def test_the_journal_of_a_committed_blob_says_nothing_of_the_next_one(store: Store) -> None:
    """A process was killed after it had given the blob its name and before the journal went."""
    first = lead(store)
    first.set_size(len(DATA))
    receive(first, 0, len(DATA))
    journal = store.staging.root / f"{DIGEST.encoded}.spans"
    kept = journal.read_bytes()
    first.commit(store.blobs.commit)
    first.close()
    journal.write_bytes(kept)
    store.blobs.path(DIGEST).unlink()
    second = lead(store)
    early = follow(store)
    early.refresh()
    receive(second, 300, 400)
    late = follow(store)
    for follower in (early, late):
        follower.refresh()
        assert list(follower.ranges) == [(300, 400)]
        follower.close()
    assert list(second.ranges) == [(300, 400)]
    second.close()


def test_what_a_follower_read_of_an_old_journal_is_taken_back(store: Store) -> None:
    path = store.staging.root / DIGEST.encoded
    path.touch()
    path.with_name(path.name + ".spans").write_bytes(b"size 1000\n0 1000\n")
    follower = follow(store)
    follower.refresh()
    assert list(follower.ranges) == []
    leader = lead(store)
    receive(leader, 600, 700)
    follower.refresh()
    assert list(follower.ranges) == [(600, 700)]
    follower.close()
    leader.close()


def test_discarding_leaves_nothing(store: Store, leader: Ingest) -> None:
    receive(leader, 0, 300)
    leader.discard()
    assert staged(store) == []
    # The name is free for the next leader, though the first still holds the old file.
    second = lead(store)
    assert not second.is_same_file(leader)
    second.close()


def test_a_full_disk_is_store_full(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    ingest = Ingest(tmp_path / "arriving", DIGEST, full, leading=True)
    with pytest.raises(StoreFull):
        ingest.write(0, b"x")
    ingest.close()


def test_half_a_line_of_an_old_journal_hides_nothing(store: Store) -> None:
    path = store.staging.root / DIGEST.encoded
    path.with_name(path.name + ".spans").write_bytes(b"size 1000\n0 500\n500 10")
    leader = lead(store)
    receive(leader, 600, 700)
    follower = follow(store)
    follower.refresh()
    assert list(follower.ranges) == [(600, 700)]
    follower.close()
    leader.close()


def test_a_leader_that_flushes_a_large_blob_is_not_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = lead(store), follow(store)
    receive(leader, 0, len(DATA))
    silence = Silence(follower.file, 1.0)

    def slow(_: int) -> None:
        end = time.monotonic() + 4
        while time.monotonic() < end and not store.blobs.path(DIGEST).exists():
            assert not silence.is_long()
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        leader.commit(store.blobs.commit)
    time.sleep(1.5)
    found = store.blobs.find(DIGEST)
    assert found is not None
    assert found.sealed
    found.file.close()
    leader.close()
    follower.close()


def test_a_disk_that_is_full_just_at_the_journal_ends_no_download(store: Store) -> None:
    leader = lead(store)
    (store.staging.root / f"{leader.path.name}.spans").symlink_to("/dev/full")
    leader.set_size(len(DATA))
    receive(leader, 0, 600)
    receive(leader, 600, len(DATA))
    leader.commit(store.blobs.commit)
    leader.close()
    assert store.blobs.path(DIGEST).read_bytes() == DATA
    assert staged(store) == []
