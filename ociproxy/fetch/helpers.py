"""Connections that help the leading one of a fill: how many there are, when none is left."""

from __future__ import annotations

from threading import Condition, Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


class Helpers:
    """`lock` is the fill's; `idle` is told whenever a helper, or a claim, has ended."""

    def __init__(
        self, lock: Lock, most: int, spawn: Callable[[Callable[[], None]], Future[None]]
    ) -> None:
        self.idle = Condition(lock)
        self.count = 0
        self._most = most
        self._spawn = spawn

    @property
    def is_full(self) -> bool:
        return self.count >= self._most

    def take(self) -> bool:
        """With the lock held: claim a place, which `call` must fill."""
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
        helper.add_done_callback(lambda _: self._ended())

    def wait(self) -> None:
        """Until none is left."""
        with self.idle:
            self.idle.wait_for(lambda: self.count == 0)

    def _ended(self) -> None:
        with self.idle:
            self.count -= 1
            self.idle.notify_all()
