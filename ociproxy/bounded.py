"""A mapping that forgets entries nobody asks for: the only kind of cache in this program."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("used", "value", "weight")

    def __init__(self, value: V, weight: int) -> None:
        self.value = value
        self.weight = weight
        self.used = False


class BoundedCache(Generic[K, V]):
    """Holds entries up to a total weight (bytes, or a count where every entry weighs 1);
    thread-safe.

    The oldest go first, except that an entry which was asked for since it was last looked at gets
    another round (CLOCK, or second chance): asking moves nothing and takes no lock, and every warm
    request asks several times.
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
        """An entry heavier than the whole cache is not kept."""
        with self._lock:
            if weight > self._limit:
                self._drop(key)
                return
            old = self._entries.get(key)
            if old is not None:
                self._weight -= old.weight
            self._make_room(weight, key)
            # In the place of the old one: whoever asks meanwhile finds one or the other.
            self._entries[key] = entry = _Entry(value, weight)
            self._weight += weight
            entry.used = old is not None

    def drop(self, key: K) -> None:
        with self._lock:
            self._drop(key)

    def _make_room(self, weight: int, key: K) -> None:
        """For an entry with this key, which is not weighed and stays where it is one already."""
        while self._weight + weight > self._limit:
            oldest, entry = next(iter(self._entries.items()))
            if entry.used or oldest == key:
                entry.used = False
                # Not out and in again, which would hide it for a moment.
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
