"""The clock, where a test moves it."""

from __future__ import annotations


class HandClock:
    """Both clocks show `time`, which only the test changes."""

    def __init__(self, time: float = 0.0) -> None:
        self.time = time

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time
