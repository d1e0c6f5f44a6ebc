"""Which upstream answers for a registry, whether it may be asked just now, and the asking itself.

Everything short that is asked of an upstream goes through `Upstreams.ask`: one question at a time
for one key, however many want the answer; in threads of a pool of its own; with the retry policy; a
refusal is kept for a while, and an upstream that cannot be reached is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import SystemClock
from ociproxy.config.settings import Upstream
from ociproxy.errors import (
    OciProxyError,
    UpstreamForbidden,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Backend, retrying
from ociproxy.fetch.upstreams.endpoints import Endpoints
from ociproxy.fetch.upstreams.health import PROBE_WAIT, Condition, Health, Quota
from ociproxy.fetch.upstreams.threads import UNLISTED, Pools

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.oci.reference import Repository

T = TypeVar("T")
MakeBackend = Callable[[Upstream], Backend]

_UNLISTED_BACKENDS: Final = 256
"""Unlisted upstreams whose connections are kept; their names come from outside."""
_NEGATIVE_ANSWERS: Final = 10_000
_QUOTA_INTERVAL: Final = 60.0
"""Seconds between two log lines about what is left of an upstream's rate limit."""


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """One upstream as of now, for whoever watches: its condition, the seconds until it is asked
    again, and what it last said of its rate limit."""

    registry: str
    condition: Condition
    seconds: float
    quota: Quota | None


class Upstreams:
    """Owned by one event loop; `close` when it ends."""

    def __init__(
        self, config: Config, make_backend: MakeBackend, *, clock: Clock | None = None
    ) -> None:
        self._config = config
        self._isolated = config.isolated
        self._make_backend = make_backend
        self._clock = clock or SystemClock()
        self._listed: dict[str, Backend] = {}
        self._unlisted: BoundedCache[str, Backend] = BoundedCache(_UNLISTED_BACKENDS)
        self._health: BoundedCache[str, Health] = BoundedCache(_NEGATIVE_ANSWERS)
        self._quotas: BoundedCache[str, tuple[float, Quota]] = BoundedCache(_UNLISTED_BACKENDS)
        self._negative: BoundedCache[Hashable, tuple[float, OciProxyError]] = BoundedCache(
            _NEGATIVE_ANSWERS
        )
        self._making = Lock()
        self._asking: dict[Hashable, asyncio.Task[object]] = {}
        self._questions = Pools(
            "questions to upstreams", size=config.fetch.requests, queue=config.fetch.queue
        )
        self._threads = ThreadPoolExecutor(config.fetch.requests, thread_name_prefix="work")

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
        if self._config.serve.offline:
            return
        for registry in self._config.upstreams:
            try:
                self.backend(registry)
            except OciProxyError as exc:
                log.event(logging.ERROR, "upstream unusable", upstream=registry, reason=exc)

    def _backend_of(self, upstream: Upstream) -> Backend:
        registry = upstream.name
        known = (self._listed if upstream.listed else self._unlisted).get(registry)
        if known is None:
            known = (
                Endpoints(
                    upstream, self._make_backend, pause=self._config.fetch.pause, clock=self._clock
                )
                if upstream.endpoints
                else self._make_backend(upstream)
            )
            if upstream.listed:
                self._listed[registry] = known
            else:
                self._unlisted.put(registry, known)
        return known

    def permit(self, repository: Repository) -> None:
        """Raises UpstreamForbidden where a rule forbids to serve this repository, stored or not."""
        if self._isolated and repository.registry not in self._config.upstreams:
            reason = "not listed in the configuration, which isolates repositories"
            raise UpstreamForbidden(repository.registry, reason)
        rule = self._config.repository_refusal(repository)
        if rule is not None:
            raise UpstreamForbidden(repository.registry, f"repository {repository.name}: {rule}")

    def check(self, repository: Repository) -> None:
        """Raises at once what asking for something of this repository now would end in: forbidden,
        offline, left alone, throttled."""
        self.permit(repository)
        registry = repository.registry
        if self._config.serve.offline:
            raise UpstreamUnavailable(registry, "this mirror is offline")
        health = self._health.get(registry)
        if health is not None:
            health.admit(self._clock.monotonic())

    def wait_limit(self, registry: str) -> float | None:
        """Seconds that a client may wait for this upstream beyond all other bounds: little while
        one question finds out whether it is back."""
        health = self._health.get(registry)
        if health is None or health.condition(self._clock.monotonic())[0] != "probing":
            return None
        return PROBE_WAIT

    def note(self, registry: str, error: OciProxyError | None) -> None:
        """Learn from how a question, or a fill, ended; None is well."""
        health = self._health.get(registry)
        if error is None:
            if health is not None and health.answered():
                log.event(logging.INFO, "upstream is back", upstream=registry)
            return
        health = health or Health(registry, self._config.fetch.pause)
        if health.failed(error, self._clock.monotonic()):
            self._health.put(registry, health)
            log.event(logging.WARNING, "upstream paused", upstream=registry, reason=error)
        elif isinstance(error, UpstreamUnavailable):
            self._health.put(registry, health)  # it counts

    def states(self) -> list[UpstreamState]:
        """Of every upstream that has been asked and is remembered."""
        now = self._clock.monotonic()
        with self._making:
            backends = [*self._listed.items(), *self._unlisted.items()]
        states = []
        for registry, backend in backends:
            health = self._health.get(registry)
            condition, seconds = (health or Health(registry, 0.0)).condition(now)
            states.append(UpstreamState(registry, condition, seconds, backend.quota))
        return states

    def refusal(self, key: Hashable) -> OciProxyError | None:
        """What this question was refused with a moment ago."""
        kept = self._negative.get(key)
        if kept is None or kept[0] < self._clock.monotonic():
            return None
        return kept[1]

    def keep_refusal(self, key: Hashable, error: OciProxyError) -> None:
        if error.negative_cacheable:
            self._negative.put(
                key, (self._clock.monotonic() + self._config.fetch.negative_ttl, error)
            )

    def is_asking(self, key: Hashable) -> bool:
        return key in self._asking

    async def ask(
        self,
        repository: Repository,
        key: Hashable,
        question: Callable[[Backend], T],
        *,
        tries: int = 2,
    ) -> T:
        """The answer to one question, asked once for all who want it now.

        `question` runs in a thread and blocks; the key names question and answer. A caller that is
        cancelled leaves the question running for the others. Raises what the question raised, what
        `check` would, or Busy where as many questions are waiting as may.
        """
        registry = repository.registry
        task = self._asking.get(key)
        if task is None:
            refusal = self.refusal(key)
            if refusal is not None:
                raise refusal.with_traceback(None)
            self._questions.check_room(self._pool_of(registry))
            self.check(repository)
            backend = self.backend(registry)
            attempts = retrying(tries=tries, wait_max=self._config.fetch.retry_wait_max)
            answer = self._questions.submit(
                self._pool_of(registry), lambda: attempts(question, backend)
            )
            task = asyncio.create_task(self._run(registry, key, backend, answer))
            self._asking[key] = task
        try:
            async with asyncio.timeout(self.wait_limit(registry)):
                return cast("T", await asyncio.shield(task))
        except TimeoutError as exc:
            raise still_away(registry) from exc

    async def call(self, work: Callable[[], T]) -> T:
        """Run something that blocks, but asks nobody, in threads that no upstream can hold up."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Returns without waiting for upstreams that do not answer."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        self._questions.shutdown()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for backend in (*self._listed.values(), *self._unlisted.values()):
            backend.close()

    async def _run(
        self,
        registry: str,
        key: Hashable,
        backend: Backend,
        answering: asyncio.Future[T],
    ) -> T:
        try:
            answer = await answering
        except OciProxyError as exc:
            self.note(registry, exc)
            self.keep_refusal(key, exc)
            raise
        else:
            self.note(registry, None)
            return answer
        finally:
            self._watch_quota(registry, backend)
            del self._asking[key]

    def _pool_of(self, registry: str) -> str:
        """An upstream that hangs holds up itself; unlisted ones, named by clients, each other."""
        return registry if registry in self._config.upstreams else UNLISTED

    def _watch_quota(self, registry: str, backend: Backend) -> None:
        """Log what is left of it: at most once in a while, and when little is left."""
        quota, now = backend.quota, self._clock.monotonic()
        if quota is None:
            return
        told = self._quotas.get(registry)
        if told is not None:
            sinks = quota.is_low and not told[1].is_low
            if told[1] == quota or (now - told[0] < _QUOTA_INTERVAL and not sinks):
                return
        self._quotas.put(registry, (now, quota))
        log.event(
            logging.WARNING if quota.is_low else logging.INFO,
            "upstream quota",
            upstream=registry,
            limit=quota.limit,
            remaining=quota.remaining,
            window=quota.window,
        )


def still_away(registry: str) -> UpstreamUnavailable:
    """What a client is told who could not wait for the question that finds out."""
    return UpstreamUnavailable(registry, "still does not answer", timed_out=True)
