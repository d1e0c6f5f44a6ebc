"""With a limit: a cache, which drops the entries that are not asked for (CLOCK); threads."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("used", "value", "weight")

    def __init__(self, value: V, weight: int) -> None:
        self.value = value
        self.weight = weight
        self.used = False


class BoundedCache(Generic[K, V]):
    """Holds entries up to a total weight: bytes, or a count if each entry weighs 1. Thread-safe.

    The oldest entry is dropped first, but an entry that was asked for gets one more round (CLOCK,
    or second chance). `get` moves nothing and takes no lock: a warm request calls it several times.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = True
        return entry.value

    def put(self, key: K, value: V, weight: int = 1) -> None:
        """Add or replace an entry; one that is heavier than the whole cache is not kept."""
        with self._lock:
            if weight > self._limit:
                self._drop(key)
                return
            old = self._entries.get(key)
            if old is not None:
                self._weight -= old.weight
            if self._weight + weight > self._limit:
                self._make_room(weight, key)
            # Replaced in place: a thread that calls `get` now finds the old entry or the new one.
            self._entries[key] = entry = _Entry(value, weight)
            self._weight += weight
            entry.used = old is not None

    def drop(self, key: K) -> None:
        with self._lock:
            self._drop(key)

    def _make_room(self, weight: int, key: K) -> None:
        """Drop entries until `weight` fits; an old entry of this key stays, and is not counted."""
        while self._weight + weight > self._limit:
            oldest, entry = next(iter(self._entries.items()))
            if entry.used or oldest == key:
                entry.used = False
                # Not removed and added again: for a moment `get` would not find it.
                self._entries.move_to_end(oldest)
            else:
                self._drop(oldest)

    def _drop(self, key: K) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._weight -= old.weight

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> list[tuple[K, V]]:
        with self._lock:
            return [(key, entry.value) for key, entry in self._entries.items()]

    def values(self) -> list[V]:
        with self._lock:
            return [entry.value for entry in self._entries.values()]


class BoundedThreads:
    """Daemon threads, at most `most`: one is made where none is free. For short works: a pool of
    `concurrent.futures` takes the processor for ten times as long with each, for a future that is
    not looked at here, and a semaphore. Thread-safe."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._works: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = Lock()
        self._threads = 0
        self.free = 0
        """Threads without work, less the works that wait for a thread."""
        self._closed = False

    def submit(self, work: Callable[[], object]) -> None:
        """`work` raises nothing. Raises RuntimeError after `shutdown`, and where the system starts
        not even one thread."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads are shut down")
            if self.free <= 0 and self._threads < self._most:
                self._add()
            self.free -= 1
            self._works.put(work)

    def shutdown(self) -> None:
        """Without waiting for work that has begun; drops the rest."""
        with self._lock:
            self._closed = True
            with suppress(Empty):
                while True:
                    self._works.get_nowait()
            for _ in range(self._threads):
                self._works.put(None)

    def _add(self) -> None:
        name = f"{self._name}_{self._threads}"
        try:
            Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise
        else:
            self._threads += 1
            self.free += 1

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            work()
            del work  # an idle thread keeps nothing alive
            with self._lock:
                self.free += 1
