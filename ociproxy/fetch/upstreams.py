"""Which upstream answers for a registry, whether it may be asked just now, and the asking itself.

Everything short that is asked of an upstream goes through `Upstreams.ask`: one question at a time
for one key, however many want the answer; in threads of a pool of its own; with the retry policy; a
refusal is kept for a while, and an upstream that cannot be reached is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import SystemClock
from ociproxy.config.settings import Upstream
from ociproxy.errors import (
    BlobUnknown,
    IntegrityError,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamForbidden,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.upstream import Backend, retrying

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config

T = TypeVar("T")
MakeBackend = Callable[[Upstream], Backend]

_UNLISTED_BACKENDS: Final = 256
"""Unlisted upstreams whose connections are kept; their names come from outside."""
_NEGATIVE_ANSWERS: Final = 10_000
_REFUSALS: Final = (
    ManifestUnknown,
    BlobUnknown,
    NameUnknown,
    UpstreamDenied,
    UpstreamForbidden,
    UpstreamUntrusted,
    ManifestInvalid,
    IntegrityError,
)


class _Health:
    """Until when (monotonic seconds) one upstream is not asked, and the error to give instead."""

    def __init__(self) -> None:
        self._until = -math.inf
        self._reason = ""
        self._limited = False

    def check(self, upstream: str, now: float) -> None:
        left = self._until - now
        if left <= 0:
            return
        if self._limited:
            raise UpstreamRateLimited(upstream, self._reason, retry_after=math.ceil(left))
        raise UpstreamUnavailable(
            upstream, f"left alone for {math.ceil(left)} s more: {self._reason}"
        )

    def note(self, error: OciProxyError, now: float, pause: float) -> bool:
        """Take in how a question ended; True when a pause begins."""
        if isinstance(error, UpstreamRateLimited):
            self._until, self._limited = now + error.retry_after, True
        elif isinstance(error, UpstreamUnavailable) and error.unreachable:
            self._until, self._limited = now + pause, False
        else:
            return False
        self._reason = error.reason
        return True


class Upstreams:
    """Owned by one event loop; `close` when it ends."""

    def __init__(
        self, config: Config, make_backend: MakeBackend, *, clock: Clock | None = None
    ) -> None:
        self._config = config
        self._make_backend = make_backend
        self._clock = clock or SystemClock()
        self._listed: dict[str, Backend] = {}
        self._unlisted: BoundedCache[str, Backend] = BoundedCache(_UNLISTED_BACKENDS)
        self._health: BoundedCache[str, _Health] = BoundedCache(_NEGATIVE_ANSWERS)
        self._negative: BoundedCache[Hashable, tuple[float, OciProxyError]] = BoundedCache(
            _NEGATIVE_ANSWERS
        )
        self._making = Lock()
        self._asking: dict[Hashable, asyncio.Task[object]] = {}
        self._threads = ThreadPoolExecutor(config.fetch.requests, thread_name_prefix="request")

    def upstream(self, registry: str) -> Upstream:
        """Raises UpstreamForbidden where the configuration allows no question to this registry."""
        upstream = self._config.upstreams.get(registry)
        if upstream is not None:
            return upstream
        if self._config.fetch.unlisted.policy == "deny":
            raise UpstreamForbidden(registry, "not listed in the configuration (unlisted: deny)")
        return self._config.unlisted_upstream(registry)

    def backend(self, registry: str) -> Backend:
        """From any thread."""
        upstream = self.upstream(registry)
        with self._making:
            return self._backend_of(upstream)

    def prepare(self) -> None:
        """Make the listed backends before anybody asks; blocks, for it reads certificates."""
        for registry in self._config.upstreams:
            try:
                self.backend(registry)
            except OciProxyError as exc:
                log.event(logging.ERROR, "upstream unusable", upstream=registry, reason=exc)

    def _backend_of(self, upstream: Upstream) -> Backend:
        registry = upstream.name
        known = (self._listed if upstream.listed else self._unlisted).get(registry)
        if known is None:
            known = self._make_backend(upstream)
            if upstream.listed:
                self._listed[registry] = known
            else:
                self._unlisted.put(registry, known)
        return known

    def check(self, registry: str) -> None:
        """Raises at once what asking this upstream now would end in: offline, in its back-off,
        throttled."""
        if self._config.serve.offline:
            raise UpstreamUnavailable(registry, "this mirror is offline")
        health = self._health.get(registry)
        if health is not None:
            health.check(registry, self._clock.monotonic())

    def note(self, registry: str, error: OciProxyError) -> None:
        """Learn from how a question, or a fill, ended."""
        health = self._health.get(registry) or _Health()
        if health.note(error, self._clock.monotonic(), self._config.fetch.pause):
            self._health.put(registry, health)
            log.event(logging.WARNING, "upstream paused", upstream=registry, reason=error)

    def refusal(self, key: Hashable) -> OciProxyError | None:
        """What this question was refused with a moment ago."""
        kept = self._negative.get(key)
        if kept is None or kept[0] < self._clock.monotonic():
            return None
        return kept[1]

    def keep_refusal(self, key: Hashable, error: OciProxyError) -> None:
        if isinstance(error, _REFUSALS):
            self._negative.put(
                key, (self._clock.monotonic() + self._config.fetch.negative_ttl, error)
            )

    def is_asking(self, key: Hashable) -> bool:
        return key in self._asking

    async def ask(
        self, registry: str, key: Hashable, question: Callable[[Backend], T], *, tries: int = 2
    ) -> T:
        """The answer to one question, asked once for all who want it now.

        `question` runs in a thread and blocks; the key names question and answer. A caller that is
        cancelled leaves the question running for the others. Raises what the question raised, or
        `check` would.
        """
        task = self._asking.get(key)
        if task is None:
            refusal = self.refusal(key)
            if refusal is not None:
                raise refusal.with_traceback(None)
            self.check(registry)
            backend = self.backend(registry)
            task = asyncio.create_task(self._run(registry, key, backend, question, tries))
            self._asking[key] = task
        return cast("T", await asyncio.shield(task))

    async def call(self, work: Callable[[], T]) -> T:
        """Run something that blocks, but asks nobody, in the same threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Returns without waiting for upstreams that do not answer."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for backend in (*self._listed.values(), *self._unlisted.values()):
            backend.close()

    async def _run(
        self,
        registry: str,
        key: Hashable,
        backend: Backend,
        question: Callable[[Backend], object],
        tries: int,
    ) -> object:
        attempts = retrying(tries=tries, wait_max=self._config.fetch.retry_wait_max)
        try:
            return await self.call(lambda: attempts(question, backend))
        except OciProxyError as exc:
            self.note(registry, exc)
            self.keep_refusal(key, exc)
            raise
        finally:
            del self._asking[key]
