"""Whether an upstream, or one endpoint of it, may be asked just now: a circuit breaker.

It is left alone after it could not be reached, each time longer, and after a 429 for as long as it
asked. When a back-off is over one question goes through and decides; the others fail at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final, Literal

from ociproxy.errors import (
    OciProxyError,
    StoreError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

Condition = Literal["available", "unreachable", "probing", "limited"]

_FIRST_PAUSE: Final = 2.0
"""Seconds of the first back-off; each one that follows is twice as long, up to a limit."""
_TIMEOUTS: Final = 3
"""Questions in a row without an answer in time that are taken for an upstream that is away."""
_PROBE_LIMIT: Final = 20.0
"""Seconds after which another question may find out what the first one has not told."""
PROBE_WAIT: Final = 0.7
"""Seconds that a client waits for the question that finds out: a miss has to fail fast."""

_QUOTA_FIELD: Final = re.compile(r"(\d{1,15})\s*(?:;\s*w\s*=\s*(\d{1,9}))?(?:[;,].*)?")


@dataclass(frozen=True, slots=True)
class Quota:
    """What an upstream says of its rate limit: requests, per `window` seconds where it says so."""

    limit: int
    remaining: int
    window: int | None = None

    @property
    def is_low(self) -> bool:
        return self.remaining * 10 < self.limit

    @staticmethod
    def parse(headers: Mapping[str, str]) -> Quota | None:
        """Docker Hub's `ratelimit-limit: 100;w=21600` and `ratelimit-remaining`; `headers` is
        asked without regard to case. None where they are not there, or no numbers."""
        limit = _QUOTA_FIELD.fullmatch(headers.get("ratelimit-limit", "").strip())
        remaining = _QUOTA_FIELD.fullmatch(headers.get("ratelimit-remaining", "").strip())
        if limit is None or remaining is None:
            return None
        window = remaining[2] or limit[2]
        return Quota(int(limit[1]), int(remaining[1]), None if window is None else int(window))


class Health:
    """Thread-safe; all times are seconds of one monotonic clock."""

    def __init__(self, upstream: str, longest: float) -> None:
        """`longest` is the most that a back-off grows to."""
        self._upstream = upstream
        self._longest = longest
        self._lock = Lock()
        self._reason: str | None = None
        self._limited = False
        self._until = -math.inf
        self._pause = 0.0
        self._timeouts = 0
        self._probing_until = -math.inf

    def admit(self, now: float) -> bool:
        """True where this question is the one that finds out. Raises UpstreamRateLimited or
        UpstreamUnavailable while the upstream is left alone."""
        with self._lock:
            if self._reason is None:
                return False
            left = self._until - now
            if self._limited:
                if left > 0:
                    raise UpstreamRateLimited(
                        self._upstream, self._reason, retry_after=math.ceil(left)
                    )
                self._reset()
                return False
            if left > 0:
                reason = f"left alone for {math.ceil(left)} s more: {self._reason}"
                raise UpstreamUnavailable(self._upstream, reason, unreachable=True)
            if now < self._probing_until:
                reason = f"left alone while one request finds out: {self._reason}"
                raise UpstreamUnavailable(self._upstream, reason, unreachable=True)
            self._probing_until = now + _PROBE_LIMIT
            return True

    def failed(self, error: OciProxyError, now: float) -> bool:
        """Take in how a question ended; True when a pause begins."""
        if isinstance(error, StoreError):
            return False
        with self._lock:
            if isinstance(error, UpstreamRateLimited):
                self._limited, self._reason = True, error.reason
                self._until = max(self._until, now + error.retry_after)
                return True
            if not isinstance(error, UpstreamUnavailable):
                self._answered()
                return False
            if not error.unreachable:
                if not error.timed_out:
                    self._answered()
                    return False
                self._timeouts += 1
                if self._timeouts < _TIMEOUTS and self._reason is None:
                    return False
            if self._limited or now < self._until:
                return False  # it is left alone already; this question began before that
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), self._longest)
            self._until = now + self._pause
            self._probing_until = -math.inf
            self._reason = error.reason
            return True

    def answered(self) -> bool:
        """It gave an answer, of whatever kind; True when that ends a back-off."""
        with self._lock:
            return self._answered()

    def condition(self, now: float) -> tuple[Condition, float]:
        """And the seconds that it lasts."""
        with self._lock:
            left = max(self._until - now, 0.0)
            if self._reason is None or (self._limited and not left):
                return "available", 0.0
            if self._limited:
                return "limited", left
            return ("unreachable", left) if left else ("probing", 0.0)

    def _answered(self) -> bool:
        self._timeouts = 0
        if self._reason is None or self._limited:
            return False  # a 429 stands until its time is over, whatever was under way
        self._reset()
        return True

    def _reset(self) -> None:
        self._reason, self._limited, self._pause, self._timeouts = None, False, 0.0, 0
        self._until = self._probing_until = -math.inf
