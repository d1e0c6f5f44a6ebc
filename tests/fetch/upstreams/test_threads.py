"""Threads shared among upstreams: what hangs at one holds up nothing at another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import pytest

from ociproxy.errors import Busy, StoreError
from ociproxy.fetch.upstreams.threads import LOOK, StoreThreads, UpstreamThreads


class Hanging:
    """Work that ends when the test does."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self) -> bool:
        return self.event.wait(60)


@pytest.fixture
def hang() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.event.set()


def threads(share: int = 4, queue: int = 8, listed: str = "listed") -> UpstreamThreads:
    return UpstreamThreads("fills", share=share, queue=queue, is_listed=listed.__eq__)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(futures: list[Future[bool]]) -> int:
    return sum(future.running() for future in futures)


def test_one_upstream_alone_gets_its_whole_share(hang: Hanging) -> None:
    pool = threads()
    assert begun([pool.submit("a", hang) for _ in range(10)]) == 4


@pytest.mark.parametrize("bad", [1, 3, 6])
def test_upstreams_that_hang_leave_a_thread_for_the_next_one(hang: Hanging, bad: int) -> None:
    pool = threads()
    for number in range(bad):
        for _ in range(40):
            pool.submit(f"bad{number}", hang)
    assert pool.submit("good", lambda: 7).result(10) == 7
    assert pool.submit("listed", lambda: 8).result(10) == 8


def test_unlisted_upstreams_leave_half_of_the_threads_to_listed_ones(hang: Hanging) -> None:
    pool = threads()
    futures = [pool.submit(f"bad{number}", hang) for number in range(100)]
    assert begun(futures) == 16
    assert [pool.submit("listed", lambda: 8).result(10) for _ in range(3)] == [8, 8, 8]


def test_works_of_one_upstream_begin_in_order() -> None:
    pool = threads(share=1)
    first, order = threading.Event(), list[str]()
    pool.submit("a", lambda: first.wait(60))
    waiting = [pool.submit("a", partial(order.append, name)) for name in ("first", "second")]
    first.set()
    for each in waiting:
        each.result(10)
    assert order == ["first", "second"]


def test_a_free_thread_goes_to_the_upstream_that_has_the_fewest(hang: Hanging) -> None:
    pool, ending = threads(share=2), threading.Event()
    for name in ("a", "a", "b", "b", "c", "c", "busy"):
        pool.submit(name, hang)
    last = pool.submit("d", lambda: ending.wait(60))
    waiting = {name: pool.submit(name, hang) for name in ("busy", "idle")}
    assert begun(list(waiting.values())) == 0
    ending.set()
    last.result(10)
    wait_until(lambda: begun(list(waiting.values())) > 0)
    assert waiting["idle"].running()
    assert not waiting["busy"].running()


def test_work_that_is_cancelled_before_its_turn_never_begins(hang: Hanging) -> None:
    pool, ran = threads(share=1, queue=1), list[int]()
    pool.submit("a", hang)
    waiting = pool.submit("a", lambda: ran.append(1))
    with pytest.raises(Busy, match="2 fills"):
        pool.check_room("a")
    assert waiting.cancel()
    pool.check_room("a")
    hang.event.set()
    pool.submit("a", lambda: None).result(10)
    assert not ran


def test_a_full_queue_of_one_upstream_leaves_room_for_another(hang: Hanging) -> None:
    pool = threads(share=1, queue=2)
    for _ in range(3):
        pool.check_room("a")
        pool.submit("a", hang)
    with pytest.raises(Busy):
        pool.check_room("a")
    pool.check_room("b")


def test_an_error_reaches_the_caller_and_frees_the_thread() -> None:
    pool = threads(share=1)

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pool.submit("a", fail).result(10)
    assert pool.submit("a", lambda: 1).result(10) == 1


def test_shutdown_cancels_what_waits(hang: Hanging) -> None:
    pool = threads(share=1)
    pool.submit("a", hang)
    waiting = pool.submit("a", hang)
    pool.shutdown()
    assert waiting.cancelled()
    with pytest.raises(RuntimeError):
        pool.submit("a", hang)


def nothing() -> None:
    """A look that finds nothing."""


def test_what_a_look_finds_waits_for_no_upstream_and_asks_none(hang: Hanging) -> None:
    pool, asked = threads(), list[int]()
    hanging = [pool.submit(f"bad{number}", hang) for number in range(100)]
    found = pool.submit_after("bad0", lambda: 7, lambda: asked.append(1))
    assert found is not None
    assert found.result(10) == 7
    assert not asked
    assert begun(hanging) == 16


def test_the_thread_that_finds_nothing_does_the_work_itself() -> None:
    pool, looked = threads(), list[int]()

    def look() -> None:
        looked.append(threading.get_ident())

    done = pool.submit_after("a", look, threading.get_ident)
    assert done is not None
    assert done.result(10) == looked[0]


def is_full(pool: UpstreamThreads, upstream: str) -> bool:
    try:
        pool.check_room(upstream)
    except Busy:
        return True
    return False


def test_work_after_a_look_waits_for_its_turn_as_any_other(hang: Hanging) -> None:
    pool = threads(share=1, queue=1)
    pool.submit("a", hang)
    waiting = pool.submit_after("a", nothing, lambda: True)
    wait_until(lambda: is_full(pool, "a"))
    refused = pool.submit_after("a", nothing, lambda: True)
    assert waiting is not None
    assert refused is not None
    with pytest.raises(Busy):
        refused.result(10)
    assert not waiting.done()
    hang.event.set()
    assert waiting.result(10)


def test_while_as_many_looks_hang_as_there_may_be_no_further_one_begins(hang: Hanging) -> None:
    pool = threads(share=2)
    looks = [pool.submit_after("a", hang, nothing) for _ in range(2)]
    assert pool.submit_after("a", nothing, nothing) is None
    assert pool.submit("a", lambda: 7).result(10) == 7
    hang.event.set()
    assert [look.result(10) for look in looks if look is not None] == [True, True]


async def test_where_as_many_looks_hang_as_there_are_threads_the_next_one_waits_for_none(
    hang: Hanging,
) -> None:
    threads = StoreThreads(2)
    looks = [asyncio.create_task(threads.look(hang)) for _ in range(2)]
    await asyncio.sleep(0)
    for look in looks:
        look.cancel()
    await asyncio.wait(looks)
    with pytest.raises(StoreError, match="does not answer"):
        async with asyncio.timeout(LOOK / 2):
            await threads.look(lambda: True)
    hang.event.set()
    assert await threads.run(lambda: True)
    await asyncio.sleep(0)
    assert await threads.look(lambda: True)
    threads.close()
