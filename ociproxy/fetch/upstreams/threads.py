"""Threads for work that an upstream may hold up."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

UNLISTED: Final = "unlisted"
LISTED: Final = "listed"


class Pools:
    """Several pools of `size` threads, made as their names turn up: those who share a name can hold
    up each other, and nobody else. Names must not come from clients. Belongs to one event loop."""

    def __init__(self, what: str, *, size: int, queue: int) -> None:
        self._what = what
        self._size = size
        self._queue = queue
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._count: Counter[str] = Counter()

    def check_room(self, name: str) -> None:
        """Raises Busy where as much is running and waiting in this pool as may."""
        if self._count[name] >= self._size + self._queue:
            raise Busy(f"{self._count[name]} {self._what}, and more may not wait")

    def submit(self, name: str, work: Callable[[], T]) -> asyncio.Future[T]:
        """Begin it when it is its turn. Cancelling the answer does not end what has begun."""
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = ThreadPoolExecutor(
                self._size, thread_name_prefix=f"{name} {self._what}"
            )
        # Counted from now on, and not from its turn: many may come at once.
        self._count[name] += 1
        answer = asyncio.get_running_loop().run_in_executor(pool, work)
        answer.add_done_callback(lambda _: self._count.subtract((name,)))
        return answer

    def shutdown(self) -> None:
        """Without waiting for work that has begun."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
