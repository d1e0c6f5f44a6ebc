"""Hashing beside those who write: gaps, what was there before, many connections."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.store.hashing import InOrderHasher
from ociproxy.store.ingest import Ingest
from ociproxy.store.staging import Staging

MIB = 1024 * 1024
DATA = os.urandom(9 * MIB + 7)
STEP = 100_000
STARTS = range(0, len(DATA), STEP)


@pytest.fixture
def ingest(tmp_path: Path) -> Iterator[Ingest]:
    made = Staging(tmp_path).lead(Digest.of(DATA))
    assert made is not None
    yield made
    made.close()


@pytest.fixture
def hasher(ingest: Ingest) -> Iterator[InOrderHasher]:
    made = InOrderHasher(ingest.digest, ingest, lambda at: ingest.ranges.stop_after(at))
    yield made
    made.stop()


def put(ingest: Ingest, start: int, stop: int) -> bytes:
    data = DATA[start:stop]
    ingest.write(start, data)
    ingest.arrived(start, start + len(data))
    return data


@pytest.mark.parametrize("thread", [False, True])
def test_what_was_there_before_is_read(ingest: Ingest, hasher: InOrderHasher, thread: bool) -> None:
    put(ingest, 1000, len(DATA))
    put(ingest, 0, 1000)
    if thread:
        hasher.start()
    assert hasher.digest() == Digest.of(DATA)
    assert hasher.position == len(DATA)


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("thread", [False, True])
def test_bytes_may_come_in_any_order(
    ingest: Ingest, hasher: InOrderHasher, connections: int, thread: bool
) -> None:
    if thread:
        hasher.start()
        hasher.start()
    for start in sorted(STARTS, key=lambda at: at // STEP % connections):
        hasher.take(start, put(ingest, start, start + STEP))
    assert hasher.digest() == Digest.of(DATA)


def test_several_connections_may_bring_them_at_once(ingest: Ingest, hasher: InOrderHasher) -> None:
    hasher.start()
    lock = threading.Lock()

    def bring(start: int) -> None:
        with lock:
            data = put(ingest, start, start + STEP)
        hasher.take(start, data)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bring, STARTS))
    assert hasher.digest() == Digest.of(DATA)


def test_what_comes_in_order_is_not_read_again(ingest: Ingest, hasher: InOrderHasher) -> None:
    hasher.start()
    for start in STARTS:
        data = put(ingest, start, start + STEP)
        ingest.write(start, bytes(len(data)))
        hasher.take(start, data)
    assert hasher.digest() == Digest.of(DATA)


def test_what_came_out_of_order_is_caught_up_with_on_the_way(
    ingest: Ingest, hasher: InOrderHasher
) -> None:
    """And not all at the end, nor all at once while a connection is idle."""
    put(ingest, 0, 8 * MIB)
    hasher.take(8 * MIB, put(ingest, 8 * MIB, 8 * MIB + STEP))
    assert 0 < hasher.position < 8 * MIB
    before = hasher.position
    hasher.take(8 * MIB + STEP, put(ingest, 8 * MIB + STEP, 9 * MIB))
    assert before < hasher.position < 8 * MIB
    hasher.take(9 * MIB, put(ingest, 9 * MIB, len(DATA)))
    assert hasher.digest() == Digest.of(DATA)


def test_what_lies_behind_a_gap_is_not_hashed(ingest: Ingest, hasher: InOrderHasher) -> None:
    put(ingest, 0, 1000)
    hasher.take(2000, put(ingest, 2000, len(DATA)))
    assert hasher.digest() == Digest.of(DATA[:1000])
    assert hasher.position == 1000


def test_stopping_ends_the_thread(hasher: InOrderHasher) -> None:
    before = threading.active_count()
    hasher.start()
    assert threading.active_count() == before + 1
    hasher.stop()
    assert threading.active_count() == before


def test_without_threads_it_hashes_all_the_same(
    ingest: Ingest, hasher: InOrderHasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start)
    hasher.start()
    for start_at in STARTS:
        hasher.take(start_at, put(ingest, start_at, start_at + STEP))
    assert hasher.digest() == Digest.of(DATA)
