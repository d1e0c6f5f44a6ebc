"""Trying again, in a load, what may pass: an upstream that is down, breaks off or throttles."""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy.bounded import BoundedCache
from ociproxy.errors import UpstreamError, UpstreamRateLimited, UpstreamUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ociproxy.clock import Clock

T = TypeVar("T")

_REGISTRIES: Final = 1024
_FIRST_WAIT: Final = 0.2
"""Seconds; each further wait is up to twice as long."""


class Progress:
    """When (monotonic seconds) something last came in for one image."""

    def __init__(self, now: float) -> None:
        self.when = now


class Retry:
    """Tries again what may pass, until an image has made no progress for `limit` seconds.

    An upstream from which nobody has got anything for as long is taken for dead: until something
    comes from it again, the rest of its images fail at the first try.
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
