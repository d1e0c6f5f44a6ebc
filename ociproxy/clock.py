"""The two clocks, behind a seam so that tests can move them."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch: for what is written to the store."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start: for pauses and expiries within this process."""


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
