"""The bounded cache: what it keeps, and that it stays within its bound; so do the threads."""

from __future__ import annotations

import sys
import threading
import time
from queue import Queue
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.bounded import BoundedCache, BoundedThreads


def test_the_entry_that_nobody_asked_for_goes_first() -> None:
    cache: BoundedCache[str, int] = BoundedCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    assert len(cache) == 2


def test_an_entry_that_is_asked_for_outlives_any_number_of_others() -> None:
    cache: BoundedCache[int, int] = BoundedCache(3)
    cache.put(-1, 7)
    for key in range(100):
        assert cache.get(-1) == 7
        cache.put(key, key)


def test_an_entry_asked_for_once_gets_one_more_round() -> None:
    cache: BoundedCache[int, int] = BoundedCache(2)
    cache.put(-1, 7)
    assert cache.get(-1) == 7
    for key in range(4):
        cache.put(key, key)
    assert cache.get(-1) is None


def test_where_all_were_asked_for_a_new_one_still_finds_room() -> None:
    cache: BoundedCache[str, int] = BoundedCache(2)
    for value, key in enumerate("ab"):
        cache.put(key, value)
        assert cache.get(key) == value
    cache.put("c", 2)
    assert [cache.get(key) for key in "abc"] == [None, 1, 2]


def test_an_entry_that_is_put_again_makes_room_around_itself() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10)
    for key in "abc":
        cache.put(key, 0, 3)
    cache.put("a", 1, 9)
    assert [cache.get(key) for key in "abc"] == [1, None, None]
    cache.put("a", 2, 1)
    cache.put("d", 3, 9)
    assert [cache.get(key) for key in "abcd"] == [2, None, None, 3]


def test_an_entry_that_is_there_is_always_found() -> None:
    """Asking takes no lock, so nothing may be out of its place for a moment."""
    cache: BoundedCache[int, int] = BoundedCache(4)
    cache.put(-1, 7)
    misses, stopped = 0, Event()

    def ask() -> None:
        nonlocal misses
        while not stopped.is_set():
            for _ in range(1000):
                misses += cache.get(-1) is None

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    asking = Thread(target=ask)
    asking.start()
    try:
        for key in range(60_000):
            cache.get(-1)
            cache.put(key % 50, key)
            cache.put(-1, key)
    finally:
        stopped.set()
        asking.join()
        sys.setswitchinterval(before)
    assert misses == 0


def test_a_heavy_entry_drives_out_many_light_ones() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10)
    for key in "abcd":
        cache.put(key, 0, 2)
    cache.put("heavy", 1, 7)
    assert [cache.get(key) for key in "abcd"] == [None, None, None, 0]
    assert cache.get("heavy") == 1


def test_an_entry_heavier_than_the_whole_cache_takes_only_its_own_place() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10)
    cache.put("a", 1, 5)
    cache.put("b", 2, 5)
    cache.put("b", 3, 11)
    assert (cache.get("a"), cache.get("b")) == (1, None)


def test_an_entry_put_again_weighs_once() -> None:
    cache: BoundedCache[str, int] = BoundedCache(2)
    for value in range(5):
        cache.put("a", value)
    cache.put("b", 9)
    assert sorted(cache.values()) == [4, 9]


def test_dropping_makes_room_and_dropping_nothing_is_fine() -> None:
    cache: BoundedCache[str, int] = BoundedCache(1)
    cache.put("a", 1)
    cache.drop("a")
    cache.drop("a")
    assert (cache.get("a"), len(cache)) == (None, 0)
    cache.put("b", 2)
    assert cache.get("b") == 2


@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 25))))
def test_the_weight_never_exceeds_the_limit(limit: int, puts: list[tuple[int, int]]) -> None:
    cache: BoundedCache[int, int] = BoundedCache(limit)
    for key, weight in puts:
        cache.put(key, weight, weight)
        assert sum(cache.values()) <= limit
        assert (cache.get(key) == weight) is (weight <= limit)


def test_works_wait_where_as_many_threads_run_as_may() -> None:
    pool, goes_on, running = BoundedThreads(2, "test"), Event(), list[str]()
    ended = Event()

    def work() -> None:
        running.append(threading.current_thread().name)
        goes_on.wait(10)
        if len(running) == 5:
            ended.set()

    for _ in range(5):
        pool.submit(work)
    goes_on.set()
    assert ended.wait(10)
    assert {*running} <= {"test_0", "test_1"}
    pool.shutdown()


def test_a_thread_that_is_free_takes_the_next_work() -> None:
    pool = BoundedThreads(8, "free")
    names: Queue[str] = Queue()
    for _ in range(5):
        pool.submit(lambda: names.put(threading.current_thread().name))
        assert names.get(timeout=10) == "free_0"
        while pool.free < 1:
            time.sleep(0.001)
    pool.shutdown()


def test_after_the_shutdown_no_work_begins() -> None:
    pool, goes_on, began, ran = BoundedThreads(1, "ended"), Event(), Event(), list[int]()

    def work() -> None:
        began.set()
        goes_on.wait(10)

    pool.submit(work)
    pool.submit(lambda: ran.append(1))
    assert began.wait(10)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(work)
    thread = next(each for each in threading.enumerate() if each.name == "ended_0")
    goes_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert not ran
