"""Which upstream answers for a registry, and whether it may be asked now.

Permission is a rule of the configuration; `health` is the circuit breaker of each upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import Deadline, SystemClock, time_left
from ociproxy.config.settings import Upstream
from ociproxy.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamForbidden,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.backend import Backend, Quota
from ociproxy.fetch.upstreams.endpoints import Endpoints
from ociproxy.fetch.upstreams.health import PROBE_WAIT, Condition, Health

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.oci.reference import Repository

MakeBackend = Callable[[Upstream], Backend]
Unknown = type[ManifestUnknown] | type[BlobUnknown] | type[NameUnknown] | type[UpstreamUnavailable]

_UNLISTED_BACKENDS: Final = 256
"""Unlisted upstreams whose connections are kept; clients choose their names."""
_HEALTHS: Final = 10_000
_WARN_INTERVAL: Final = 300.0
"""Seconds between two warnings that an upstream denies access or is not trusted."""
_QUOTA_INTERVAL: Final = 60.0
"""Seconds between two log lines about what is left of an upstream's rate limit."""


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """One upstream now: its condition, the seconds until it is asked again, and what it last said
    of its rate limit."""

    registry: str
    listed: bool
    condition: Condition
    seconds: float
    quota: Quota | None


class AnswerTime:
    """What `Upstreams.answer_time` returns. A generator takes the event loop for twice as long."""

    def __init__(self, registry: str, seconds: float) -> None:
        self._registry = registry
        self._deadline = Deadline.after(seconds)
        self._kept = self._deadline.kept()

    async def __aenter__(self) -> None:
        self._kept.__enter__()
        try:
            self._timeout = asyncio.timeout(time_left())
        except TimeoutError as exc:
            self._kept.__exit__(None, None, None)
            raise self._late() from exc
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError as exc:
            raise self._late() from exc
        finally:
            self._kept.__exit__(None, None, None)
        if isinstance(raised[1], TimeoutError):
            raise self._late() from raised[1]

    def _late(self) -> UpstreamUnavailable:
        reason = f"no answer within {self._deadline.limit:g} s"
        return UpstreamUnavailable(self._registry, reason, timed_out=True)


class Upstreams:
    """Belongs to one event loop; `close` when it ends."""

    def __init__(
        self, config: Config, make_backend: MakeBackend, *, clock: Clock | None = None
    ) -> None:
        self.offline = config.serve.offline
        self._config = config
        self._make_backend = make_backend
        self._clock = clock or SystemClock()
        self._listed: dict[str, Backend] = {}
        self._unlisted: BoundedCache[str, Backend] = BoundedCache(_UNLISTED_BACKENDS)
        self._making = Lock()
        self._healths: BoundedCache[str, Health] = BoundedCache(_HEALTHS)
        self._warned: BoundedCache[tuple[str, type], float] = BoundedCache(_HEALTHS)
        self._quotas: BoundedCache[str, tuple[float, Quota]] = BoundedCache(_UNLISTED_BACKENDS)

    # Which upstream

    def entry(self, registry: str) -> Upstream:
        """Raises UpstreamForbidden where the configuration allows no request to this registry."""
        upstream = self._config.upstreams.get(registry)
        if upstream is not None:
            return upstream
        if self._config.fetch.unlisted.policy == "deny":
            raise UpstreamForbidden(registry, "not listed in the configuration (unlisted: deny)")
        return self._config.unlisted_upstream(registry)

    def backend(self, registry: str) -> Backend:
        """From any thread. Raises UpstreamForbidden or UpstreamUntrusted."""
        upstream = self.entry(registry)
        with self._making:
            known = (self._listed if upstream.listed else self._unlisted).get(registry)
            if known is None:
                known = self._make(upstream)
                if upstream.listed:
                    self._listed[registry] = known
                else:
                    self._unlisted.put(registry, known)
            return known

    def prepare(self) -> None:
        """Make the listed backends before a client asks. Blocks: it reads certificates."""
        if self.offline:
            return
        for registry in self._config.upstreams:
            try:
                self.backend(registry)
            except OciProxyError as exc:
                log.event(logging.ERROR, "upstream unusable", upstream=registry, reason=exc)

    # May it be asked

    def check_allowed(self, repository: Repository) -> None:
        """Raises UpstreamForbidden where a rule forbids to serve this repository, stored or not."""
        rule = self._config.repository_refusal(repository)
        if rule is not None:
            raise UpstreamForbidden(repository.registry, f"repository {repository.name}: {rule}")

    def check_online(self, unknown: Unknown, subject: object, reason: str = "not stored") -> None:
        """The one place that refuses to ask an upstream with `--offline`: raises `unknown`, the
        error for a subject that is not there."""
        if self.offline:
            raise unknown(subject, f"{reason}, and this mirror is offline")  # type: ignore[arg-type]

    def check(self, repository: Repository) -> None:
        """Raise at once what a request about this repository would end in now: forbidden, offline,
        left alone, throttled."""
        self.check_allowed(repository)
        self.check_online(UpstreamUnavailable, repository.registry)
        health = self._healths.get(repository.registry)
        if health is not None:
            health.admit(self._clock.monotonic())

    def is_well(self, registry: str) -> bool:
        """Whether `check` would let a request through, and nothing bad is known of the upstream."""
        if self.offline:
            return False
        health = self._healths.get(registry)
        return health is None or health.condition(self._clock.monotonic())[0] == "available"

    def check_again(self, repository: Repository) -> None:
        """The same for a request that `check` let through and that has waited since."""
        health = self._healths.get(repository.registry)
        if health is not None:
            health.check(self._clock.monotonic())

    def probe_wait(self, registry: str) -> float | None:
        """PROBE_WAIT while one request finds out whether this upstream is back, else None."""
        health = self._healths.get(registry)
        if health is None or health.condition(self._clock.monotonic())[0] != "probing":
            return None
        return PROBE_WAIT

    def answer_time(self, registry: str) -> AnswerTime:
        """Raises UpstreamUnavailable, timed out, where a client has waited for
        `fetch.timeouts.answer` seconds for what this upstream is asked. The waits before this one,
        and the requests to upstreams that are begun inside, are in that time."""
        return AnswerTime(registry, self._config.fetch.timeouts.answer)

    def record_result(
        self, registry: str, error: OciProxyError | None, *, asked: bool = True
    ) -> None:
        """A request or a download has ended, with this error or well. `asked` is False where it
        ended well and this upstream sent nothing."""
        health = self._healths.get(registry)
        if error is None:
            if health is not None and not asked:
                health.unasked()
            elif health is not None and health.answered():
                log.event(logging.INFO, "upstream is back", upstream=registry)
            return
        if isinstance(error, (UpstreamDenied, UpstreamUntrusted)):
            self._warn(registry, error)
        health = health or Health(registry, self._config.fetch.pause)
        if health.failed(error, self._clock.monotonic()):
            self._healths.put(registry, health)
            log.event(logging.WARNING, "upstream paused", upstream=registry, reason=error)
        elif isinstance(error, UpstreamUnavailable):
            self._healths.put(registry, health)  # it counts failures in a row

    def _warn(self, registry: str, error: OciProxyError) -> None:
        """Log what an operator has to mend, credentials or trust, once a while for each kind."""
        key, now = (registry, type(error)), self._clock.monotonic()
        last = self._warned.get(key)
        if last is None or now - last >= _WARN_INTERVAL:
            self._warned.put(key, now)
            denied = isinstance(error, UpstreamDenied)
            event = "upstream denies access" if denied else "upstream not trusted"
            log.event(logging.WARNING, event, upstream=registry, reason=error)

    def states(self) -> list[UpstreamState]:
        """Of every upstream that has been asked and is remembered."""
        with self._making:
            backends = [*self._listed.items(), *self._unlisted.items()]
        return [self._state(registry, backend) for registry, backend in backends]

    def state(self, registry: str) -> UpstreamState:
        """Of one upstream; of one that was not asked yet nothing bad is known."""
        with self._making:
            backend = self._listed.get(registry) or self._unlisted.get(registry)
        return self._state(registry, backend)

    def _state(self, registry: str, backend: Backend | None) -> UpstreamState:
        condition: Condition = "available"
        seconds = 0.0
        health = self._healths.get(registry)
        if health is not None:
            condition, seconds = health.condition(self._clock.monotonic())
        listed = registry in self._config.upstreams
        quota = backend.quota if backend else None
        return UpstreamState(registry, listed, condition, seconds, quota)

    def log_quota(self, registry: str, backend: Backend) -> None:
        """Once in a while, and at once when little is left."""
        quota, now = backend.quota, self._clock.monotonic()
        if quota is None:
            return
        last = self._quotas.get(registry)
        if last is not None:
            sinks = quota.is_low and not last[1].is_low
            if last[1] == quota or (now - last[0] < _QUOTA_INTERVAL and not sinks):
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

    def close(self) -> None:
        """Drop the backends' connections, without waiting for upstreams that do not answer."""
        for backend in (*self._listed.values(), *self._unlisted.values()):
            backend.close()

    def _make(self, upstream: Upstream) -> Backend:
        if not upstream.endpoints:
            return self._make_backend(upstream)
        return Endpoints(upstream, self._make_backend, self._config.fetch, clock=self._clock)
