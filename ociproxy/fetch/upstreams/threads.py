"""Threads: those that wait for upstreams, and those that block on the store."""

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


class UpstreamThreads:
    """Several pools of `size` threads, made as their names turn up. Work of one name can hold up
    work of the same name only. Names must not come from clients. Belongs to one event loop."""

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
        """Begin the work when it is its turn. Cancelling the future does not end work that has
        begun."""
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = ThreadPoolExecutor(
                self._size, thread_name_prefix=f"{name} {self._what}"
            )
        # Counted now and not when it begins: much work may come at once.
        self._count[name] += 1
        answer = asyncio.get_running_loop().run_in_executor(pool, work)
        answer.add_done_callback(lambda _: self._count.subtract((name,)))
        return answer

    def shutdown(self) -> None:
        """Without waiting for work that has begun."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


class StoreThreads:
    """Threads for work that blocks on the disk and asks no upstream: no upstream can hold it up."""

    def __init__(self, size: int, name: str = "store") -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Without waiting for work that has begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
