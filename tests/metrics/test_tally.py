"""Counts in shared memory: none is lost by a kill, and none is made twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from ociproxy.metrics.tally import LOST, Tally

HITS = ("ociproxy_requests", "manifest", "hit")


def in_process(work: Callable[[], None]) -> int:
    """The status of a forked process that ran it."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_processes_count_together() -> None:
    tally = Tally(3)

    def work(row: int) -> None:
        tally.use(row)
        for _ in range(1000):
            tally.add(HITS, 1)

    assert [in_process(lambda row=row: work(row)) for row in (1, 2)] == [0, 0]  # type: ignore[misc]
    tally.add(HITS, 5)
    assert tally.totals()[HITS] == [2005]


def test_who_replaces_a_killed_process_goes_on_with_its_counts() -> None:
    tally = Tally(2)

    def count_and_die() -> None:
        tally.use(1)
        tally.add(HITS, 3)
        tally.observe(("seconds", "blob"), 1, 3, 0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    def go_on() -> None:
        tally.use(1)
        tally.add(HITS, 4)
        tally.observe(("seconds", "blob"), 2, 3, 7.0)

    assert in_process(count_and_die) == -signal.SIGKILL
    assert in_process(go_on) == 0
    assert tally.totals()[HITS] == [7]
    assert tally.totals()["seconds", "blob"] == [0, 1, 1, 7.5]


def test_what_a_dead_process_was_doing_is_forgotten_with_its_successor() -> None:
    tally = Tally(2)

    def tell() -> None:
        tally.use(1)
        assert tally.set_state({"fills": 3})

    assert in_process(tell) == 0
    assert tally.states() == [{"fills": 3}]
    assert in_process(lambda: tally.use(1)) == 0
    assert tally.states() == []


def test_a_state_that_is_too_long_leaves_the_one_before() -> None:
    tally = Tally(1)
    assert tally.set_state({"fills": 1})
    assert not tally.set_state({"fills": "x" * 200_000})
    assert tally.states() == [{"fills": 1}]


def test_children_count_in_rows_of_their_own_and_a_killed_one_leaves_its_counts() -> None:
    tally = Tally.shared(1)
    tally.add(HITS, 1)
    ready, told = os.pipe(), os.pipe()

    def join() -> Tally:
        joined = Tally.joined(tally.file)
        assert joined is not None
        return joined

    def live() -> None:
        join().add(HITS, 10)
        os.write(ready[1], b"x")
        os.read(told[0], 1)

    def die() -> None:
        join().add(HITS, 100)
        os.kill(os.getpid(), signal.SIGKILL)

    living = os.fork()
    if not living:
        try:
            live()
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    for _ in range(20):  # more than there are rows: each takes that of the one before
        assert in_process(die) == -signal.SIGKILL
    os.write(told[1], b"x")
    os.waitpid(living, 0)
    assert tally.totals()[HITS] == [2011]


def test_a_child_without_a_free_row_counts_nowhere() -> None:
    tally = Tally.shared(1)
    children, ready = [], os.pipe()
    for _ in range(17):
        pid = os.fork()
        if not pid:
            joined = Tally.joined(tally.file)
            os.write(ready[1], b"." if joined else b"x")
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        if os.read(ready[0], 1) == b"x":
            break
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(children) == 17


def test_full_memory_counts_what_it_cannot_name() -> None:
    tally = Tally(1)
    for number in range(10_000):
        tally.add(("made up", str(number)), 1)
    tally.observe(("late",), 2, 13, 1.0)
    totals = tally.totals()
    assert totals["made up", "0"] == [1]
    named = sum(numbers[0] for key, numbers in totals.items() if key[0] == "made up")
    assert named + totals[LOST][0] == 10_001
    assert ("late",) not in totals


def test_a_large_number_of_bytes_is_exact() -> None:
    tally = Tally(1)
    for _ in range(3):
        tally.add(("bytes",), 2**50 + 1)
    assert tally.totals()["bytes",] == [3 * 2**50 + 3]
