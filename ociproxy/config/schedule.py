"""When chosen images are brought up to date: `sync` in the configuration.

A window is local time, as an operator reads it off the clock of the machine. Where clocks change,
a window in the hour that is left out does not open that night, and one in the hour that comes twice
is open for both.
Tests: tests/config/test_schedule.py.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final

from ociproxy.oci.platform import Platform

WINDOW: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]-(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00)"
_EARLY: Final = 3600.0
"""Seconds by which a run may be early where its window has closed by then: where clocks change, the
next night is an hour longer or shorter, and must not be skipped."""
_DAYS: Final = 3
"""Days that are looked through for an opening: clocks change on one of them at most."""


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes after midnight. One that closes before it opens is open over midnight."""

    opens: int
    closes: int

    @staticmethod
    def parse(text: str) -> Window:
        """`01:00-05:00`, `22:00-24:00`. Raises ValueError with the reason."""
        if not re.fullmatch(WINDOW, text):
            raise ValueError("must be two times of the day, such as 01:00-05:00 or 22:30-04:00")
        opens, closes = (int(part[:2]) * 60 + int(part[3:]) for part in text.split("-"))
        if opens == closes:
            raise ValueError("is never open: leave it out for the whole day")
        return Window(opens, closes)

    def is_open(self, now: float) -> bool:
        """At `now`, in seconds since the epoch."""
        local = time.localtime(now)
        minute = local.tm_hour * 60 + local.tm_min
        if self.opens < self.closes:
            return self.opens <= minute < self.closes
        return minute >= self.opens or minute < self.closes

    def next_opening(self, now: float) -> float:
        """The first opening from `now` on, in seconds since the epoch."""
        midnight = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
        for day in range(_DAYS + 1):
            opening = (midnight + timedelta(days=day, minutes=self.opens)).timestamp()
            if opening >= now and self.is_open(opening):
                return opening
        raise AssertionError(f"{self} does not open after {now}")

    def __str__(self) -> str:
        return "-".join(f"{m // 60:02}:{m % 60:02}" for m in (self.opens, self.closes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Images that are brought up to date `every` so many seconds: those of an image list, or the
    tags of the store that a glob matches. Without `platforms` a line of the list means Linux on
    this machine's processor, and a tag of the store the platforms that are stored of it."""

    images: Path | tuple[str, ...]
    every: float = 21600.0
    window: Window | None = None
    platforms: tuple[Platform, ...] = ()
    referrers: bool = False

    @property
    def key(self) -> str:
        """Of what is synced, not when: a schedule that changes keeps its last run."""
        return sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """What is synced."""
        images = str(self.images) if isinstance(self.images, Path) else ", ".join(self.images)
        platforms = f" for {', '.join(map(str, self.platforms))}" if self.platforms else ""
        return f"{images}{platforms}{' with referrers' if self.referrers else ''}"

    def is_open(self, now: float) -> bool:
        """Whether an image may be begun."""
        return self.window is None or self.window.is_open(now)

    def next_run(self, last: float | None, now: float) -> float:
        """When a run is due, from `now` on; `last` is when the last one began. Times are seconds
        since the epoch. A run of the future is none: the clock was set back."""
        due = now if last is None or last > now else max(now, last + self.every)
        if self.window is None or self.window.is_open(due):
            return due
        early = max(now, due - min(_EARLY, self.every / 2))
        return early if self.window.is_open(early) else self.window.next_opening(early)
