"""The two clocks, as a protocol so that tests can set the time. Tests: tests/clock.py."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since 1970, UTC: for times that are written to the store."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start: for waits and expiries within this process."""


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
