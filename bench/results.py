"""How long a run takes, and what comes out of it."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """How long everything takes. `limit` is when no further round of serving is begun, in
    seconds."""

    rounds: int
    # A cold blob takes a third of a second, in which a neighbour's noise decides.
    cold_rounds: int
    cold_manifests: int
    warm_rounds: int
    warm_seconds: float
    wrk_seconds: int
    slow_seconds: float
    # drayage takes longer over the stampede than everybody else together, and no target needs it.
    stampede_of_drayage: bool
    limit: float
    load_images: tuple[int, ...]
    load_rounds: int
    archive_images: int
    archive_rounds: int
    neighbour_blobs: int
    scale_manifests: int
    counting_rounds: int
    started: float = field(default_factory=time.perf_counter)

    def rounds_of(self, count: int) -> Iterator[int]:
        for number in range(count):
            if time.perf_counter() - self.started > self.limit:
                return
            yield number


@dataclass
class Results:
    cells: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    notes: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)

    def put(self, row: str, server: str, value: float) -> None:
        self.cells[row][server] = value

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
        say(f"  ! {text}")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
