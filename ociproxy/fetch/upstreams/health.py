"""Whether an upstream, or one endpoint of it, may be asked just now: a circuit breaker.

An upstream that could not be reached, or failed several times in a row, is left alone, each time
longer. After a 429 it is left alone for as long as it said. When a back-off is over, one request
probes; the others fail at once.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import Final, Literal

from ociproxy.errors import (
    Interrupted,
    OciProxyError,
    StoreError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)

Condition = Literal["available", "unreachable", "probing", "limited"]

_FIRST_PAUSE: Final = 2.0
"""Seconds of the first back-off. Each one that follows is twice as long, up to a limit."""
_FAILURES: Final = 3
"""Requests in a row that time out, break or are answered 5xx before an upstream is left alone: what
is asked for may be at fault, or a moment."""
_PROBE_LIMIT: Final = 20.0
"""Seconds that one probe may take, as long as a client waits; then another request may probe."""
PROBE_WAIT: Final = 0.7
"""Seconds that a client waits for a probe. A miss must fail fast, so that the client falls back."""


class Health:
    """The breaker of one upstream or endpoint. Thread-safe; `now` is monotonic seconds."""

    def __init__(self, upstream: str, longest: float) -> None:
        """`longest` is the seconds that a back-off grows to."""
        self._upstream = upstream
        self._longest = longest
        self._lock = Lock()
        self._reason: str | None = None
        self._limited = False
        self._until = -math.inf
        self._pause = 0.0
        self._failures = 0
        self._probing_until = -math.inf

    def check(self, now: float) -> None:
        """For a request that was admitted before and has waited: it may be the probe itself. Raises
        what `admit` does while the upstream is left alone."""
        with self._lock:
            left = self._until - now
            if self._reason is None or left <= 0:
                return
            if self._limited:
                raise UpstreamRateLimited(self._upstream, self._reason, retry_after=math.ceil(left))
            raise self._left_alone(f"for {math.ceil(left)} s more", self._reason)

    def admit(self, now: float) -> bool:
        """Call before each request; True if the request is the probe. Raises UpstreamRateLimited or
        UpstreamUnavailable while the upstream is left alone."""
        self.check(now)
        with self._lock:
            if self._reason is None:
                return False
            if self._limited:
                self._reset()
                return False
            if now < self._probing_until:
                raise self._left_alone("while one request finds out", self._reason)
            self._probing_until = now + _PROBE_LIMIT
            return True

    def _left_alone(self, how_long: str, reason: str) -> UpstreamUnavailable:
        text = f"left alone {how_long}: {reason}"
        return UpstreamUnavailable(self._upstream, text, unreachable=True)

    def failed(self, error: OciProxyError, now: float) -> bool:
        """A request ended with this error; True if a pause begins."""
        if isinstance(error, StoreError | Interrupted):
            self.unasked()  # the upstream has no part in it
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
                self._failures += 1
                if self._failures < _FAILURES and self._reason is None:
                    return False
            if self._limited or now < self._until:
                return False  # it is left alone already: this request began before
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), self._longest)
            self._until = now + self._pause
            self._probing_until = -math.inf
            self._reason = error.reason
            return True

    def answered(self) -> bool:
        """A request got an answer other than a 5xx; True if that ends a back-off."""
        with self._lock:
            return self._answered()

    def unasked(self) -> None:
        """A download ended without this upstream. It may have been the probe: the next request is
        one."""
        with self._lock:
            self._probing_until = -math.inf

    def condition(self, now: float) -> tuple[Condition, float]:
        """The condition, and the seconds that it will last: 0 unless a pause has an end."""
        with self._lock:
            left = max(self._until - now, 0.0)
            if self._reason is None or (self._limited and not left):
                return "available", 0.0
            if self._limited:
                return "limited", left
            return ("unreachable", left) if left else ("probing", 0.0)

    def _answered(self) -> bool:
        self._failures = 0
        if self._reason is None or self._limited:
            return False  # a 429 holds until its time is over: this request began before
        self._reset()
        return True

    def _reset(self) -> None:
        self._reason, self._limited, self._pause, self._failures = None, False, 0.0, 0
        self._until = self._probing_until = -math.inf
