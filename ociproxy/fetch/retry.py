"""Trying again: the rules, and who else tries again by a rule of its own.

What is repeated                  By                       How often
a request for a document          upstreams.requests       twice
a connection of a blob            download.connections     by `Resumption`, below
the image of a blob, by skopeo    skopeo.backend           `fetch.retries`
the blob at the next endpoint     upstreams.endpoints      by `Resumption`, below
an image of a list                load, by ImageRetry      until no progress for `load.pull_timeout`
a blob whose bytes were wrong     download.fills           once, from zero
a request whose token is refused  oras.auth                once, with a new token

The first five repeat what `UpstreamUnavailable` ended, by the rules here: with jitter, waiting at
most `fetch.retry_wait_max`. Once bytes of a blob have come, a connection repeats any refusal too,
and waits out a 429 of up to `fetch.pause`. Otherwise `load` alone does that: the server passes it
on to its client. No commit is ever repeated.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING, Final, TypeVar

import tenacity

from ociproxy.bounded import BoundedCache
from ociproxy.clock import SystemClock, current_deadline
from ociproxy.errors import UpstreamError, UpstreamRateLimited, UpstreamUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from threading import Event

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Fetch
    from ociproxy.errors import OciProxyError

T = TypeVar("T")
A = TypeVar("A")

_FIRST_WAIT: Final = 0.2
"""Seconds; each further wait is up to twice as long."""
_CRAWL: Final = 64 * 1024
"""Bytes that connections which break must bring in `fetch.crawl` seconds. One that brought as many
is resumed without a wait."""
_REGISTRIES: Final = 1024
_RETRY_AFTER: Final = (1.0, 30.0, 3600.0)
"""Seconds: the least, the value where the upstream names none, the most."""


def clamp_retry_after(seconds: float | None) -> float:
    """What a 429 asks for, within reason; `seconds` is None where it names no time."""
    least, default, most = _RETRY_AFTER
    return default if seconds is None else min(max(seconds, least), most)


def retrying(*, tries: int, wait_max: float, stopped: Event) -> tenacity.Retrying:
    """Repeat what UpstreamUnavailable ended: at most `tries` times in all, with jittered waits of
    at most `wait_max` seconds; the last error is raised as it is. An address that swallows packets
    is tried twice at most, for each try costs a whole time-out. Once `stopped` is set no wait goes
    on, and no try follows. No try begins after the request's deadline."""

    def stop(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        swallowed = isinstance(error, UpstreamUnavailable) and error.unreachable and error.timed_out
        if stopped.is_set() or state.attempt_number >= (min(tries, 2) if swallowed else tries):
            return True
        deadline = current_deadline()
        return deadline is not None and deadline.left <= state.upcoming_sleep

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UpstreamUnavailable),
        stop=stop,
        wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=wait_max),
        reraise=True,
        sleep=tenacity.sleep_using_event(stopped),
    )


def after(failed: UpstreamUnavailable, work: Callable[[A], T]) -> Callable[[A], T]:
    """For `retrying`: work of which the first try has been made, and has failed so."""
    first = [failed]

    def again(argument: A) -> T:
        if first:
            raise first.pop()
        return work(argument)

    return again


class Resumption:
    """The tries of one transfer: whether what broke is resumed, and after which wait.

    It ends after `tries` in a row that brought no byte; and where connections that brought some
    brought less than 64 KiB in `fetch.crawl` seconds. With `tries` 1 it ends with the first one
    that breaks. Not thread-safe.
    """

    def __init__(
        self,
        *,
        tries: int,
        limits: Fetch,
        sleep: Callable[[float], object],
        began: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`began` is when the first try began (monotonic seconds); None for now."""
        self._tries = tries
        self._limits = limits
        self._sleep = sleep
        self._clock = clock or SystemClock()
        self._empty = 0
        self._short = 0
        self._since = self._clock.monotonic() if began is None else began
        self._crawled = 0

    def brought(self, count: int) -> None:
        """A try has ended, well or not, with so many new bytes."""
        self._empty = 0 if count else self._empty + 1
        self._short = 0 if count >= _CRAWL else self._short + 1
        self._crawled += count
        if self._crawled >= _CRAWL:
            self._since, self._crawled = self._clock.monotonic(), 0

    def wait(self, error: OciProxyError) -> None:
        """After `brought`: wait until the next try. Raises `error` where there is to be none."""
        limits = self._limits
        longest = min(limits.retry_wait_max, _FIRST_WAIT * math.pow(2, min(self._short, 30)))
        wait = random.uniform(0, longest)  # noqa: S311 - jitter
        tries = self._tries
        if isinstance(error, UpstreamRateLimited):
            wait = error.retry_after
            if wait > limits.pause:
                raise error
        elif isinstance(error, UpstreamUnavailable) and error.unreachable and error.timed_out:
            tries = min(tries, 2)
        late = self._clock.monotonic() - self._since > limits.crawl
        if self._tries == 1 or self._empty >= tries or (not self._empty and late):
            raise error
        if self._short:
            self._sleep(wait)


class Progress:
    """When (monotonic seconds) something last came in for one image."""

    def __init__(self, now: float) -> None:
        self.when = now


class ImageRetry:
    """Repeats what may pass until an image has made no progress for `limit` seconds.

    An upstream from which no image has got anything for as long is taken for dead: until something
    comes from it again, the rest of its images fail at the first try. So is one whose name does not
    resolve and that has never answered: a misspelt name must not cost the user a minute.
    """

    def __init__(
        self,
        limit: float,
        *,
        wait_max: float,
        clock: Clock,
        waiting: Callable[[UpstreamError, float], None],
    ) -> None:
        """`waiting` hears of each wait: why, and for how many seconds."""
        self._limit = limit
        self._wait_max = wait_max
        self._clock = clock
        self._waiting = waiting
        self._answered: BoundedCache[str, float] = BoundedCache(_REGISTRIES)
        self._dead: BoundedCache[str, bool] = BoundedCache(_REGISTRIES)

    async def run(self, registry: str, progress: Progress, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns in the end. Raises its last error."""
        tries = 0
        while True:
            try:
                result = await work()
            except (UpstreamRateLimited, UpstreamUnavailable) as error:
                wait = self._wait(error, tries)
                if getattr(error, "unresolved", False) and self._answered.get(registry) is None:
                    self._dead.put(registry, True)  # `work` has asked twice
                if self._dead.get(registry) or not self._may_wait(registry, progress, wait):
                    raise
                tries += 1
                self._waiting(error, wait)
            else:
                progress.when = self._clock.monotonic()
                self._answered.put(registry, progress.when)
                self._dead.drop(registry)
                return result
            await asyncio.sleep(wait)

    def _wait(self, error: UpstreamError, tries: int) -> float:
        if isinstance(error, UpstreamRateLimited):
            return error.retry_after
        longest = min(self._wait_max, _FIRST_WAIT * math.pow(2, min(tries, 30)))
        return random.uniform(longest / 2, longest)  # noqa: S311 - jitter

    def _may_wait(self, registry: str, progress: Progress, wait: float) -> bool:
        if self._clock.monotonic() + wait - progress.when <= self._limit:
            return True
        if (self._answered.get(registry) or -math.inf) < progress.when:
            self._dead.put(registry, True)
        return False
