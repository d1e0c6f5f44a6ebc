"""Short requests to upstreams: manifests, heads, lists.

Callers that want the same answer at the same time share one request. A refusal is kept for a while
(`fetch.negative_ttl`). Upstreams share the threads fairly (`threads`).

Tests: tests/fetch/upstreams/test_upstreams.py, tests/serve/test_upstream_rules.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ociproxy.bounded import BoundedCache
from ociproxy.clock import (
    Deadline,
    OutOfTime,
    SystemClock,
    count_upstream_time,
    current_deadline,
    time_left,
)
from ociproxy.errors import Interrupted, OciProxyError, UpstreamUnavailable
from ociproxy.fetch.retry import after, retrying
from ociproxy.fetch.upstreams.threads import LOOK, UpstreamThreads, no_answer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.reference import Repository

T = TypeVar("T")

_TRIES: Final = 2
_NEGATIVE_ANSWERS: Final = 10_000


class _Running:
    """One request, and the callers that wait for it. Belongs to one event loop."""

    __slots__ = ("asked", "ended", "given_up", "looked", "waiters", "work")

    def __init__(self) -> None:
        self.work: Future[object]
        self.waiters: list[asyncio.Future[None]] = []
        self.ended = False
        self.looked = False
        """A look at the store has ended."""
        self.given_up = False
        """No caller waits for the look, or the engine closes."""
        self.asked: float | None = None
        """When it was its turn to ask the upstream (monotonic seconds)."""

    async def wait(self, seconds: float | None) -> bool:
        """Whether it has ended, within so many seconds. A caller that is cancelled ends nothing."""
        if not self.ended:
            # As `asyncio.wait`, which takes the event loop for three times as long.
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self.waiters.append(waiter)
            late = None if seconds is None else loop.call_later(seconds, _wake, waiter)
            try:
                await waiter
            finally:
                if late is not None:
                    late.cancel()
        return self.ended

    def end(self) -> None:
        self.ended = True
        for waiter in self.waiters:
            _wake(waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Mailbox:
    """What threads hand over to the event loop, which is woken once for all that lies there: each
    wake-up costs its sender a system call, and with it the turn. Thread-safe."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._letters: deque[Callable[[], object]] = deque()
        self._rung = False

    def post(self, letter: Callable[[], object]) -> None:
        """Have the event loop call it soon. Where the loop has ended, no caller waits for it."""
        self._letters.append(letter)
        if not self._rung:
            self._rung = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._rung = False  # before it looks: what comes from now on rings again
        letters = self._letters
        try:
            for _ in range(len(letters)):
                letters.popleft()()
        finally:
            if letters:  # a bug in one must not keep the others
                self._loop.call_soon(self._take)


class Requests:
    """Belongs to one event loop."""

    def __init__(self, upstreams: Upstreams, config: Config, *, clock: Clock | None = None) -> None:
        self._upstreams = upstreams
        self._config = config
        self._clock = clock or SystemClock()
        self._running: dict[Hashable, _Running] = {}
        self._stopped = Event()
        # Thread-safe, and as long to make as all else that a request needs here.
        self._attempts = retrying(
            tries=_TRIES, wait_max=config.fetch.retry_wait_max, stopped=self._stopped
        )
        self._refusals: BoundedCache[Hashable, tuple[float, OciProxyError]] = BoundedCache(
            _NEGATIVE_ANSWERS
        )
        self._threads = UpstreamThreads(
            "requests to upstreams",
            share=config.fetch.requests,
            queue=config.fetch.queue,
            is_listed=config.upstreams.__contains__,
        )
        self._mailbox = _Mailbox()

    async def call(
        self, repository: Repository, key: Hashable, request: Callable[[Backend], T]
    ) -> T:
        """The answer to one request, sent once for all callers that want it now.

        `request` runs in a thread and blocks; `key` names request and answer. A caller that is
        cancelled leaves the request running for the others, until the deadline of the caller that
        began it. Without one the request has `load.pull_timeout` from when it is its turn. Raises
        what the request raised, what `Upstreams.check` would, or Busy where `fetch.queue` is full.
        """
        registry = repository.registry
        running = self._running.get(key)
        if running is None:
            if self._stopped.is_set():
                raise _closed(registry)
            self.check_refused(key)
            self._threads.check_room(registry)
            self._upstreams.check(repository)
            running = _Running()
            backend = self._upstreams.backend(registry)
            ask = self._ask(registry, running, backend, request)
            running.work = self._threads.submit(registry, ask)
            self._begin(registry, key, backend, running)
        began = time.monotonic()
        try:
            if not await running.wait(self._upstreams.probe_wait(registry)):
                raise still_away(registry)
        finally:
            count_upstream_time(began)
        return cast("T", self._result(registry, running))

    async def call_after(
        self,
        repository: Repository,
        key: Hashable,
        look: Callable[[], T | None],
        request: Callable[[Backend], T],
    ) -> T | None:
        """The same after a look at the store, without a way through the event loop: the request is
        sent where `look` returns None. Returns None at once, and does neither, where the same
        request is running or was refused, or the upstream may not be asked just now. The caller is
        answered within `fetch.timeouts.answer`. Also raises what `look` raises; StoreError where
        the disk hangs.
        """
        registry = repository.registry
        refused = self._refusals.get(key) is not None
        if refused or key in self._running or not self._upstreams.is_well(registry):
            return None
        running = _Running()
        try:
            backend = self._upstreams.backend(registry)
        except OciProxyError:
            return None

        def look_first() -> object:
            found = look()
            running.looked = True
            return _LATE if found is None and running.given_up else found

        ask = self._ask(registry, running, backend, request)
        work = self._threads.submit_after(registry, look_first, ask)
        if work is None:
            return None
        running.work = work
        self._begin(registry, key, backend, running)
        deadline = current_deadline()
        try:
            if not await running.wait(LOOK if deadline is None else min(LOOK, deadline.left)):
                if not running.looked:
                    running.given_up = True
                    del self._running[key]
                    raise no_answer(LOOK)
                async with self._upstreams.answer_time(registry):
                    await running.wait(None)
        finally:
            if running.asked is not None:
                count_upstream_time(running.asked)
        return cast("T", self._result(registry, running))

    def is_running(self, key: Hashable) -> bool:
        return key in self._running

    def check_refused(self, key: Hashable) -> None:
        """Raises what the same request was refused with less than `fetch.negative_ttl` ago."""
        kept = self._refusals.get(key)
        if kept is not None and kept[0] >= self._clock.monotonic():
            raise kept[1].with_traceback(None)

    def keep_refusal(self, key: Hashable, error: OciProxyError) -> None:
        if error.negative_cacheable:
            until = self._clock.monotonic() + self._config.fetch.negative_ttl
            self._refusals.put(key, (until, error))

    async def drain(self) -> None:
        """Return when all requests have ended."""
        while self._running:
            await asyncio.wait(
                [asyncio.ensure_future(each.wait(None)) for each in self._running.values()]
            )

    def close(self) -> None:
        self._stopped.set()
        for running in self._running.values():
            running.given_up = True
            running.work.cancel()
            running.end()
        self._running.clear()
        self._threads.shutdown()

    def _ask(
        self,
        registry: str,
        running: _Running,
        backend: Backend,
        request: Callable[[Backend], T],
    ) -> Callable[[], T]:
        """What a thread does when it is the request's turn."""
        deadline = current_deadline()
        limit = self._config.load.pull_timeout

        def ask() -> T:
            running.asked = time.monotonic()
            try:
                with (deadline or Deadline.after(limit)).kept():
                    time_left()  # the wait for a turn may have taken all of it
                    try:
                        # The account of tries would take as long as parsing the answer.
                        return request(backend)
                    except UpstreamUnavailable as exc:
                        return self._attempts(after(exc, request), backend)
            except OutOfTime as exc:
                raise UpstreamUnavailable(registry, str(exc), timed_out=True) from exc

        return ask

    def _begin(self, registry: str, key: Hashable, backend: Backend, running: _Running) -> None:
        self._running[key] = running
        ended = partial(self._ended, registry, key, backend, running)
        running.work.add_done_callback(lambda _: self._mailbox.post(ended))

    def _ended(self, registry: str, key: Hashable, backend: Backend, running: _Running) -> None:
        if running.given_up:
            return
        del self._running[key]
        running.end()  # the callers go on when this method has ended
        if running.asked is None:
            return  # it was found in the store
        error = running.work.exception()
        if error is None or isinstance(error, OciProxyError):
            self._upstreams.record_result(registry, error)
        if isinstance(error, OciProxyError):
            self.keep_refusal(key, error)
        self._upstreams.log_quota(registry, backend)

    def _result(self, registry: str, running: _Running) -> object:
        if running.given_up:
            raise _closed(registry)
        return running.work.result()


_LATE: Final = object()
"""The result of a look that no caller waits for any more: the upstream is not asked for it."""


def _closed(registry: str) -> Interrupted:
    return Interrupted(registry, "shutting down")


def still_away(registry: str) -> UpstreamUnavailable:
    """For a client that could not wait for the request that probes the upstream."""
    return UpstreamUnavailable(registry, "still does not answer", timed_out=True)
