"""Short requests to upstreams: manifests, heads, lists.

Callers that want the same answer at the same time share one request. A refusal is kept for a while
(`fetch.negative_ttl`). Upstreams share the threads fairly (`threads`).

Tests: tests/fetch/upstreams/test_upstreams.py, tests/serve/test_upstream_rules.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from contextlib import suppress
from threading import Event
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar, cast

from ociproxy.bounded import BoundedCache
from ociproxy.clock import (
    Deadline,
    OutOfTime,
    SystemClock,
    current_deadline,
    time_left,
    waiting_for_upstream,
)
from ociproxy.errors import Interrupted, OciProxyError, UpstreamUnavailable
from ociproxy.fetch.retry import retrying
from ociproxy.fetch.upstreams.threads import UpstreamThreads, take_error

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


class _Running(NamedTuple):
    answer: asyncio.Future[object]
    """What the callers wait for. Cancelled where the engine closes."""
    work: Future[object]


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
            backend = self._upstreams.backend(registry)
            deadline = current_deadline()
            limit = self._config.load.pull_timeout

            def ask() -> T:
                try:
                    with (deadline or Deadline.after(limit)).kept():
                        time_left()  # the wait for a turn may have taken all of it
                        return self._attempts(request, backend)
                except OutOfTime as exc:
                    raise UpstreamUnavailable(registry, str(exc), timed_out=True) from exc

            running = self._running[key] = self._begin(registry, key, backend, ask)
        # Not awaited itself: the others want the answer of a caller that is cancelled.
        with waiting_for_upstream():
            await asyncio.wait((running.answer,), timeout=self._upstreams.probe_wait(registry))
        if not running.answer.done():
            raise still_away(registry)
        if running.answer.cancelled():
            raise _closed(registry)
        return cast("T", running.answer.result())

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
            await asyncio.wait([running.answer for running in self._running.values()])

    def close(self) -> None:
        self._stopped.set()
        for running in self._running.values():
            running.work.cancel()
            running.answer.cancel()
        self._running.clear()
        self._threads.shutdown()

    def _begin(
        self, registry: str, key: Hashable, backend: Backend, ask: Callable[[], object]
    ) -> _Running:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[object] = loop.create_future()

        def ended(work: Future[object]) -> None:
            with suppress(RuntimeError):  # the loop has ended: no caller waits
                loop.call_soon_threadsafe(self._ended, registry, key, backend, answer, work)

        work = self._threads.submit(registry, ask)
        work.add_done_callback(ended)
        return _Running(answer, work)

    def _ended(
        self,
        registry: str,
        key: Hashable,
        backend: Backend,
        answer: asyncio.Future[object],
        work: Future[object],
    ) -> None:
        if answer.done():
            return  # closed
        del self._running[key]
        error = work.exception()
        if error is None:
            answer.set_result(work.result())
        else:
            answer.set_exception(error)
            take_error(answer)
        # The callers go on when this has ended.
        if error is None or isinstance(error, OciProxyError):
            self._upstreams.record_result(registry, error)
        if isinstance(error, OciProxyError):
            self.keep_refusal(key, error)
        self._upstreams.log_quota(registry, backend)


def _closed(registry: str) -> Interrupted:
    return Interrupted(registry, "shutting down")


def still_away(registry: str) -> UpstreamUnavailable:
    """For a client that could not wait for the request that probes the upstream."""
    return UpstreamUnavailable(registry, "still does not answer", timed_out=True)
