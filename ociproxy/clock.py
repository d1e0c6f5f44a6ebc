"""The two clocks, as a protocol so that tests can set the time; and the time that a request has.

A `Deadline` travels with a request: through the tasks that answer it, and in the thread that asks
its upstream. `time_left` is the length of each wait on the way. Tests: tests/clock.py,
tests/fetch/test_deadline.py.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class UpstreamTime:
    """How long a request has waited for upstreams, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def count(self) -> None:
        """From now on, waits in this task and those that it makes are this request's."""
        _upstream_time.set(self)


_upstream_time: Final[ContextVar[UpstreamTime | None]] = ContextVar("upstream time", default=None)


def count_upstream_time(since: float) -> None:
    """The request has waited for an upstream since then (monotonic seconds)."""
    time_of = _upstream_time.get()
    if time_of is not None:
        time_of.seconds += time.monotonic() - since


@contextmanager
def waiting_for_upstream() -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        count_upstream_time(began)


_LEAST: Final = 0.001
"""Seconds of the shortest wait: a socket's time-out of 0 would mean not to wait at all."""


class OutOfTime(TimeoutError):
    """The request has used up its time."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """`limit` is what a request has in all, `when` its end (monotonic); both are seconds."""

    limit: float
    when: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(seconds, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds; none or less once the time is over."""
        return self.when - time.monotonic()

    def kept(self) -> Kept:
        """Inside, `time_left` obeys this deadline; one outside that is earlier goes on to hold.
        Tasks that are made inside inherit it, threads do not."""
        return Kept(self)


class Kept:
    """What `Deadline.kept` returns. A generator takes three times as long."""

    __slots__ = ("_deadline", "_token")

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def __enter__(self) -> None:
        outer = _kept.get()
        own = self._deadline
        self._token = _kept.set(own if outer is None or own.when < outer.when else outer)

    def __exit__(self, *_: object) -> None:
        _kept.reset(self._token)


_kept: Final[ContextVar[Deadline | None]] = ContextVar("deadline", default=None)


def current_deadline() -> Deadline | None:
    return _kept.get()


def time_left(limit: float = math.inf) -> float:
    """Seconds that one wait may take: `limit`, or what the request has left where that is less.
    Raises OutOfTime where nothing is left."""
    late = out_of_time()
    if late is not None:
        raise late
    deadline = _kept.get()
    return limit if deadline is None else min(limit, max(deadline.left, _LEAST))


def out_of_time() -> OutOfTime | None:
    """What `time_left` would raise now."""
    deadline = _kept.get()
    if deadline is None or deadline.left > 0:
        return None
    return OutOfTime(f"no answer within {deadline.limit:g} s")
