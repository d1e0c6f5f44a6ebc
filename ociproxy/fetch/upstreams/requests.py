"""Short requests to upstreams: manifests, heads, lists.

Callers that want the same answer at the same time share one request. A refusal is kept for a while
(`fetch.negative_ttl`). Upstreams share the threads fairly (`threads`).

Tests: tests/fetch/upstreams/test_upstreams.py, tests/serve/test_upstream_rules.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Final, TypeVar, cast

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


class Requests:
    """Belongs to one event loop."""

    def __init__(self, upstreams: Upstreams, config: Config, *, clock: Clock | None = None) -> None:
        self._upstreams = upstreams
        self._config = config
        self._clock = clock or SystemClock()
        self._running: dict[Hashable, asyncio.Task[object]] = {}
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
        task = self._running.get(key)
        if task is None:
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

            answer = self._threads.submit(registry, ask)
            task = asyncio.create_task(self._run(registry, key, backend, answer))
            task.add_done_callback(partial(self._ended, key))
            self._running[key] = task
        try:
            async with asyncio.timeout(self._upstreams.probe_wait(registry)):
                with waiting_for_upstream():
                    return cast("T", await asyncio.shield(task))
        except TimeoutError as exc:
            raise still_away(registry) from exc
        except asyncio.CancelledError:
            if not task.cancelled() or _is_told_to_end():
                raise
            # The engine closes. The caller lives, and has to answer its client.
            raise _closed(registry) from None

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
            await asyncio.wait(self._running.values())

    async def close(self) -> None:
        self._stopped.set()
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._threads.shutdown()

    async def _run(self, registry: str, key: Hashable, backend: Backend, answering: Future[T]) -> T:
        try:
            answer = await asyncio.wrap_future(answering)
        except OciProxyError as exc:
            self._upstreams.record_result(registry, exc)
            self.keep_refusal(key, exc)
            raise
        else:
            self._upstreams.record_result(registry, None)
            return answer
        finally:
            self._upstreams.log_quota(registry, backend)

    def _ended(self, key: Hashable, task: asyncio.Task[object]) -> None:
        """Also of a task that was cancelled before it began."""
        del self._running[key]
        take_error(task)


def _closed(registry: str) -> Interrupted:
    return Interrupted(registry, "shutting down")


def _is_told_to_end() -> bool:
    """Whether this task itself has been cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def still_away(registry: str) -> UpstreamUnavailable:
    """For a client that could not wait for the request that probes the upstream."""
    return UpstreamUnavailable(registry, "still does not answer", timed_out=True)
