"""Hashing behind those who write: gaps, a thread of its own, an early end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ociproxy.digest import Digest
from ociproxy.fetch.inorder import InOrderHasher
from ociproxy.store.staging import Arrival, Staging

DATA = os.urandom(3 * 1024 * 1024 + 7)


@pytest.fixture
def arrival(tmp_path: Path) -> Iterator[Arrival]:
    made = Staging(tmp_path).lead(Digest.of(DATA))
    assert made is not None
    yield made
    made.close()


def hasher_of(arrival: Arrival) -> InOrderHasher:
    return InOrderHasher(arrival.digest, arrival, lambda at: arrival.spans.stop_after(at))


def put(arrival: Arrival, start: int, stop: int) -> None:
    arrival.write(start, DATA[start:stop])
    arrival.arrived(start, stop)


def test_without_a_thread_all_is_hashed_at_the_end(arrival: Arrival) -> None:
    put(arrival, 1000, len(DATA))
    put(arrival, 0, 1000)
    hasher = hasher_of(arrival)
    assert hasher.digest() == Digest.of(DATA)
    assert hasher.position == len(DATA)


def test_a_thread_keeps_up_with_bytes_in_any_order(arrival: Arrival) -> None:
    hasher = hasher_of(arrival)
    with ThreadPoolExecutor(1) as pool:
        hasher.follow(pool.submit)
        hasher.follow(pool.submit)
        step = 100_000
        for start in sorted(range(0, len(DATA), step), key=lambda at: at // step % 3):
            put(arrival, start, min(start + step, len(DATA)))
            hasher.more()
        assert hasher.digest() == Digest.of(DATA)
        hasher.stop()


def test_what_lies_behind_a_gap_is_not_hashed(arrival: Arrival) -> None:
    put(arrival, 0, 1000)
    put(arrival, 2000, len(DATA))
    hasher = hasher_of(arrival)
    assert hasher.digest() == Digest.of(DATA[:1000])
    assert hasher.position == 1000


def test_stopping_ends_a_thread_that_waits_for_more(arrival: Arrival) -> None:
    hasher = hasher_of(arrival)
    with ThreadPoolExecutor(1) as pool:
        hasher.follow(pool.submit)
        put(arrival, 0, 1000)
        hasher.more()
        hasher.stop()


def test_a_thread_that_was_never_run_is_not_waited_for(arrival: Arrival) -> None:
    hasher = hasher_of(arrival)
    busy = hasher_of(arrival)
    with ThreadPoolExecutor(1) as pool:
        busy.follow(pool.submit)
        hasher.follow(pool.submit)
        hasher.stop()
        busy.stop()
