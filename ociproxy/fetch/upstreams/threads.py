"""Threads: those that wait for upstreams, and those that block on the store."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeVar

from ociproxy import log
from ociproxy.bounded import BoundedThreads
from ociproxy.errors import Busy, StoreError

T = TypeVar("T")
_Turn = tuple[str, Future[Any], Callable[[], object]]
"""An upstream, and the work that is begun for it."""

_SHARES: Final = 8
"""Shares of threads, and of the queue, that there are in all. A thread that waits costs 50 KiB."""
LOOK: Final = 5.0
"""Seconds that one look at the store may take: a disk that is only busy takes less."""
_BEAT: Final = 1.0
"""Seconds between two looks at whether the store answers, and how long one may take."""
_FIRST: Final = 2
"""Works of an upstream that may have any free thread."""


class UpstreamThreads:
    """Threads shared fairly among upstreams, for work that waits for one of them. Thread-safe.

    An upstream runs up to `share` works at once while threads are free. Half of the threads are
    reserved: each upstream may run two works there, so dozens of upstreams that hang leave some
    for the next one. In the other half an upstream may use at most as many threads as stay free.
    Unlisted upstreams, which clients name, together leave half of all threads to listed ones.
    Works of one upstream begin in order; a free thread goes to the upstream that has the fewest.

    A work may have a look at the store before it. Looks have `share` threads of their own, so that
    what is stored waits for no upstream. The thread that looked goes on with the work.
    """

    def __init__(
        self, what: str, *, share: int, queue: int, is_listed: Callable[[str], bool]
    ) -> None:
        self._what = what
        self._share = share
        self._queue = queue
        self._is_listed = is_listed
        self._threads = _SHARES * share
        self._lock = Lock()
        self._pool = BoundedThreads(self._threads + share, what)
        self._looks = 0
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[Future[object], Callable[[], object]]]] = {}
        self._closed = False

    def check_room(self, upstream: str) -> None:
        """Raises Busy where as much work waits for this upstream, or for all, as may."""
        with self._lock:
            self._check_room(upstream)

    def _check_room(self, upstream: str) -> None:
        """Under the lock."""
        own = len(self._waiting.get(upstream, ()))
        if own == 0 and self._may_begin(upstream, self._most()):
            return
        rooms = _SHARES if self._is_listed(upstream) else _SHARES // 2
        rest = rooms * self._queue - sum(map(len, self._waiting.values()))
        if own >= self._queue or rest <= 0:
            running = self._running[upstream] + own
            raise Busy(f"{running} {self._what}, and more may not wait")

    def submit(self, upstream: str, work: Callable[[], T]) -> Future[T]:
        """Begin the work when it is its turn. Cancelling the future takes work that has not begun
        out of the queue; it does not end work that has. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads are shut down")
            if not self._waiting and self._may_begin(upstream, self._most()):
                if self._count(upstream, future):
                    self._pool.submit(partial(self._run, (upstream, future, work)))
                return future  # as most work does
            self._wait(upstream, future, work)
        future.add_done_callback(partial(self._forget, upstream))
        self._begin()
        return future

    def submit_after(
        self, upstream: str, look: Callable[[], T | None], work: Callable[[], T]
    ) -> Future[T] | None:
        """The same after a look at the store, where that has no result. Returns None while as many
        looks run as may. The result is Busy where the work would have to wait, and may not."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed or self._looks >= self._share:
                return None
            self._looks += 1
            self._pool.submit(partial(self._look, upstream, future, look, work))
        return future

    def shutdown(self) -> None:
        """Without waiting for work that has begun; cancels the rest."""
        with self._lock:
            self._closed = True
            waiting = [future for works in self._waiting.values() for future, _ in works]
        for future in waiting:
            future.cancel()
        self._pool.shutdown()

    def _most(self) -> tuple[int, int]:
        """The most works that an unlisted upstream, and a listed one, may have running now."""
        unlisted = sum(n for name, n in self._running.items() if not self._is_listed(name))
        half = self._threads // 2
        free = self._threads - self._running.total()
        return self._limit(min(free, half - unlisted), half), self._limit(free, self._threads)

    def _limit(self, free: int, of: int) -> int:
        return 0 if free <= 0 else min(self._share, max(_FIRST, free - of // 2))

    def _may_begin(self, upstream: str, most: tuple[int, int]) -> bool:
        return self._running[upstream] < most[self._is_listed(upstream)]

    def _begin(self) -> None:
        """Start what may start now."""
        while True:
            with self._lock:
                following = self._next()
                if following is None:
                    return
                self._pool.submit(partial(self._run, following))

    def _next(self) -> _Turn | None:
        """What may start now, taken out of the queue and counted. Under the lock."""
        while self._waiting and not self._closed:
            most = self._most()
            able = [name for name in self._waiting if self._may_begin(name, most)]
            if not able:
                return None
            upstream = min(able, key=self._running.__getitem__)
            future, work = self._pop(upstream)
            if self._count(upstream, future):
                return upstream, future, work
        return None

    def _count(self, upstream: str, future: Future[Any]) -> bool:
        """Whether the work may begin: it was not cancelled. Under the lock."""
        if not future.set_running_or_notify_cancel():
            return False
        self._running[upstream] += 1
        return True

    def _wait(self, upstream: str, future: Future[Any], work: Callable[[], object]) -> None:
        """Under the lock."""
        self._waiting.setdefault(upstream, deque()).append((future, work))

    def _pop(self, upstream: str) -> tuple[Future[object], Callable[[], object]]:
        works = self._waiting[upstream]
        first = works.popleft()
        if not works:
            del self._waiting[upstream]
        return first

    def _look(
        self,
        upstream: str,
        future: Future[Any],
        look: Callable[[], object],
        work: Callable[[], object],
    ) -> None:
        found, error = _outcome(look)
        queued = found is None and error is None and not self._closed
        if queued:
            future.add_done_callback(partial(self._forget, upstream))
        with self._lock:
            self._looks -= 1
            if queued:
                try:
                    self._check_room(upstream)
                    self._wait(upstream, future, work)
                except Busy as exc:
                    error, queued = exc, False
            following = self._next()
        if not queued and future.set_running_or_notify_cancel():
            _end(future, found, error)
        self._run(following)

    def _run(self, turn: _Turn | None) -> None:
        """This work, then what waits: a thread that has its turn goes on, and wakes no other."""
        while turn is not None:
            upstream, future, work = turn
            result, error = _outcome(work)
            with self._lock:
                self._running[upstream] -= 1
                if not self._running[upstream]:
                    del self._running[upstream]
                turn = self._next()
                more = bool(self._waiting)
            _end(future, result, error)
            del future, work, result, error  # an idle thread keeps nothing alive
            if more:
                self._begin()

    def _forget(self, upstream: str, future: Future[T]) -> None:
        """Work that was cancelled before its turn waits no more."""
        if not future.cancelled():
            return
        with self._lock:
            works = self._waiting.get(upstream)
            if works is None:
                return
            rest = deque(each for each in works if each[0] is not future)
            if rest:
                self._waiting[upstream] = rest
            else:
                del self._waiting[upstream]


def _outcome(work: Callable[[], object]) -> tuple[object, BaseException | None]:
    try:
        return work(), None
    except BaseException as exc:  # noqa: BLE001 as concurrent.futures does: the caller gets it
        return None, exc


def _end(future: Future[Any], result: object, error: BaseException | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def take_error(ended: asyncio.Future[Any]) -> None:
    """Of work whose callers may have left: asyncio complains about errors that are never taken."""
    if not ended.cancelled():
        ended.exception()


class StoreThreads:
    """Threads for work that blocks on the disk and asks no upstream: no upstream can hold it up."""

    def __init__(self, size: int, name: str = "store", *, is_remote: bool = False) -> None:
        """`is_remote` is that of the store."""
        self.is_remote = is_remote
        self._pool = BoundedThreads(size, name)
        self._size = size
        self._left = 0
        """Looks that no caller waits for any more, and that have not ended."""
        self.hung: StoreError | None = None
        """Why the store is not to be asked now: a look at it has been running for too long."""

    async def run(self, work: Callable[[], T]) -> T:
        return await self._submit(work)

    async def look(self, work: Callable[[], T], late: Callable[[T], None] = lambda _: None) -> T:
        """The same for `LOOK` seconds at most. `late` gets what comes after that. Raises StoreError
        where the disk hangs, or as many looks as there are threads have been given up."""
        self.check_answers()
        if self._left >= self._size:
            raise no_answer(LOOK)
        looking = self._submit(work)
        try:
            await asyncio.wait((looking,), timeout=LOOK)
        finally:
            if not looking.done():
                self._left += 1
                looking.add_done_callback(partial(self._take_late, late))
        if not looking.done():
            raise no_answer(LOOK)
        return looking.result()

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """As `run_in_executor`, which takes the event loop for twice as long: it chains a future
        of the thread's to one of the loop's. Work that has begun is not told of a cancellation."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            if ended.cancelled():
                return
            tell: Callable[[], None]
            try:
                tell = partial(_set_result, ended, work())
            except BaseException as exc:  # noqa: BLE001 as concurrent.futures does: the caller gets it
                tell = partial(_set_error, ended, exc)
            with suppress(RuntimeError):  # the loop has ended: no caller waits
                loop.call_soon_threadsafe(tell)

        self._pool.submit(run)
        return ended

    async def open(self, work: Callable[[], T], late: Callable[[T], None]) -> T:
        """The same for an open of what is open already: the event loop does it, unless the open may
        wait for a network or a program."""
        return await self.look(work, late) if self.is_remote else work()

    def _take_late(self, late: Callable[[T], None], looked: asyncio.Future[T]) -> None:
        self._left -= 1
        if not looked.cancelled() and looked.exception() is None:
            late(looked.result())

    def check_answers(self) -> None:
        """Raises StoreError where the disk hangs."""
        if self.hung is not None:
            raise self.hung.with_traceback(None)

    async def watch(self, look: Callable[[], object]) -> None:
        """For ever, look at the store every `_BEAT` seconds. While that takes longer, it hangs."""
        watching = ThreadPoolExecutor(1, thread_name_prefix="watch")
        try:
            while True:
                looking = asyncio.get_running_loop().run_in_executor(watching, look)
                looking.add_done_callback(take_error)
                if not (await asyncio.wait({looking}, timeout=_BEAT))[0]:
                    self.hung = no_answer(_BEAT)
                    log.event(logging.WARNING, "store hangs", reason=self.hung)
                    await asyncio.wait({looking})
                    self.hung = None
                    log.event(logging.INFO, "store answers again")
                await asyncio.sleep(_BEAT)
        finally:
            watching.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Without waiting for work that has begun."""
        self._pool.shutdown()


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def no_answer(seconds: float) -> StoreError:
    return StoreError(Path(), f"its disk does not answer within {seconds:g} s")
