"""Which bytes of a blob have arrived: disjoint, sorted, half-open ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class ByteRanges:
    """Not thread-safe. It stays short, for ranges that touch become one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Record that [start, stop) arrived; parts of that may have arrived before."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def stop_after(self, offset: int) -> int:
        """Where the bytes that arrived from `offset` on end; `offset` itself if its byte is
        missing."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or self._stops[index] <= offset:
            return offset
        return self._stops[index]

    def gap(self, offset: int, end: int) -> tuple[int, int] | None:
        """The first missing range between `offset` and `end`; None if there is none."""
        start = self.stop_after(offset)
        if start >= end:
            return None
        index = bisect_right(self._starts, start)
        stop = self._starts[index] if index < len(self._starts) else end
        return start, min(stop, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The arrived ranges, in order."""
        return iter(list(zip(self._starts, self._stops, strict=True)))

    @property
    def total(self) -> int:
        """How many bytes have arrived."""
        return sum(self._stops) - sum(self._starts)
