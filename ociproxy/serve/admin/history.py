"""The last days of this server in a few numbers: for the plots of the page.

Tests: tests/serve/admin/test_page.py.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from ociproxy.metrics.counters import REQUESTS, RESPONSE_BYTES, UPSTREAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ociproxy.metrics.tally import Key

INTERVAL: Final = 300.0
"""Seconds between two samples."""
_SAMPLES: Final = 7 * 24 * 12
"""A week of them."""
_HITS: Final = ("hit", "stale")
_PULLED: Final = ("manifest", "blob")
"""Kinds of requests that count: the page is about pulls."""
_NO_ANSWERS: Final = ("error", "abandoned")


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals since the server's start, but for `stored`, the size of the store; `at` is epoch
    seconds."""

    at: float
    answers: float
    hits: float
    sent: float
    fetched: float
    stored: float | None

    @staticmethod
    def of(totals: Mapping[Key, list[float]], stored: float | None) -> Sample:
        def total(name: str, *outcomes: str) -> float:
            return sum(
                numbers[0]
                for key, numbers in totals.items()
                if key[0] == name
                and (name == UPSTREAM_BYTES.name or key[1] in _PULLED)
                and (not outcomes or key[2] in outcomes)
            )

        none = total(REQUESTS.name, *_NO_ANSWERS)
        return Sample(
            time.time(),
            total(REQUESTS.name) - none,
            total(REQUESTS.name, *_HITS),
            total(RESPONSE_BYTES.name),
            total(UPSTREAM_BYTES.name),
            stored,
        )

    @property
    def hit_ratio(self) -> float | None:
        """Of the answers; None where there were none."""
        return self.hits / self.answers if self.answers else None

    @property
    def saved(self) -> float:
        """Bytes that clients got and no upstream had to send."""
        return max(0.0, self.sent - self.fetched)


class History:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)

    def hit_ratios(self) -> list[tuple[float, float]]:
        """Between each two samples with answers between them: when, and which part were hits."""
        samples = list(self._samples)
        return [
            (new.at, (new.hits - old.hits) / (new.answers - old.answers))
            for old, new in pairwise(samples)
            if new.answers > old.answers
        ]

    def sizes(self) -> list[tuple[float, float]]:
        """Of the store, where it was known."""
        return [(each.at, each.stored) for each in self._samples if each.stored is not None]


def plot(points: Sequence[tuple[float, float]], highest: float) -> str:
    """The `points` attribute of an SVG polyline in a box of 600 by 120; "" for fewer than two."""
    if len(points) < 2 or highest <= 0:
        return ""
    first, last = points[0][0], points[-1][0]
    width = (last - first) or 1.0
    return " ".join(
        f"{600 * (at - first) / width:.1f},{118 - 116 * min(value / highest, 1.0):.1f}"
        for at, value in points
    )
