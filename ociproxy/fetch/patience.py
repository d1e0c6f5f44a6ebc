"""How long a load waits out what may pass: an upstream that is down, breaks off or throttles."""

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


class Patience:
    """Tries again what may pass, for `limit` seconds from the last progress of the image, and of
    its upstream.

    So a slow image is never given up while bytes arrive, and once an upstream has given nothing to
    anybody for that long, the rest of its images fail at the first try.
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

    async def persist(
        self, registry: str, progress: Progress, work: Callable[[], Awaitable[T]]
    ) -> T:
        """What `work` returns in the end. Raises its last error."""
        began = self._clock.monotonic()
        tries = 0
        while True:
            try:
                result = await work()
            except (UpstreamRateLimited, UpstreamUnavailable) as error:
                answered = self._answered.get(registry)
                if answered is None or began < progress.when > answered:
                    # The first question, or it broke off after something had come.
                    answered = progress.when
                    self._answered.put(registry, answered)
                wait = self._wait(error, tries)
                if not self._may_wait(progress, answered, wait):
                    raise
                tries += 1
                self._waiting(error, wait)
            else:
                progress.when = self._clock.monotonic()
                self._answered.put(registry, progress.when)
                return result
            await asyncio.sleep(wait)

    def _wait(self, error: UpstreamError, tries: int) -> float:
        if isinstance(error, UpstreamRateLimited):
            return error.retry_after
        longest = min(self._wait_max, _FIRST_WAIT * math.pow(2, min(tries, 30)))
        return random.uniform(longest / 2, longest)  # noqa: S311 - jitter

    def _may_wait(self, progress: Progress, answered: float, wait: float) -> bool:
        until = self._clock.monotonic() + wait
        return until - progress.when <= self._limit and until - answered <= self._limit
