"""Connections that help the leading one of a fill: how many there are, when none is left."""

from __future__ import annotations

from threading import Condition, Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_LOOK: Final = 0.5
"""Seconds between looks at who has not begun."""


class Helpers:
    """`lock` is the fill's; `idle` is told whenever a helper, or a segment, has ended."""

    def __init__(
        self, lock: Lock, most: int, spawn: Callable[[Callable[[], None]], Future[None]]
    ) -> None:
        self.idle = Condition(lock)
        self.count = 0
        self._most = most
        self._spawn = spawn
        self._helpers: set[Future[None]] = set()

    @property
    def is_full(self) -> bool:
        return self.count >= self._most

    def take(self) -> bool:
        """With the lock held: segment a place, which `call` must fill."""
        if self.is_full:
            return False
        self.count += 1
        return True

    def call(self, work: Callable[[], None]) -> None:
        """After `take`, without the lock: run one more connection."""
        try:
            helper = self._spawn(work)
        except RuntimeError:
            self._ended()  # the pool has been closed
            return
        with self.idle:
            self._helpers.add(helper)
        helper.add_done_callback(self._ended)

    def wait(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Until none is left, or `enough`, which is asked with the lock held.

        Those whose turn has not come are dismissed: their threads may be taken by fills that wait
        for help as this one does.
        """
        while True:
            with self.idle:
                helpers = list(self._helpers)
            for helper in helpers:
                helper.cancel()
            with self.idle:
                # One that was taken may be called only now: look again.
                if self.idle.wait_for(lambda: self.count == 0 or enough(), _LOOK):
                    return

    def _ended(self, helper: Future[None] | None = None) -> None:
        with self.idle:
            if helper is not None:
                self._helpers.discard(helper)
            self.count -= 1
            self.idle.notify_all()
