"""ByteRanges, against the plainest model there is: the set of the bytes that arrived."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ociproxy.store.ingest import ByteRanges

END = 60
OFFSETS = st.integers(0, END)
RANGES = st.lists(st.tuples(OFFSETS, OFFSETS), max_size=20)


def spans_of(ranges: list[tuple[int, int]]) -> tuple[ByteRanges, set[int]]:
    spans, model = ByteRanges(), set[int]()
    for start, stop in ranges:
        spans.add(start, stop)
        model.update(range(start, stop))
    return spans, model


@given(RANGES)
def test_spans_hold_exactly_what_was_added(ranges: list[tuple[int, int]]) -> None:
    spans, model = spans_of(ranges)
    held = [offset for start, stop in spans for offset in range(start, stop)]
    assert held == sorted(model)
    assert spans.total == len(model)


@given(RANGES)
def test_neighbours_merge_so_that_a_missing_byte_lies_between_any_two(
    ranges: list[tuple[int, int]],
) -> None:
    spans, _ = spans_of(ranges)
    found = list(spans)
    assert all(start < stop for start, stop in found)
    assert all(left[1] < right[0] for left, right in pairwise(found))


@given(RANGES, OFFSETS)
def test_a_run_stops_at_the_first_missing_byte(ranges: list[tuple[int, int]], offset: int) -> None:
    spans, model = spans_of(ranges)
    expected = next(n for n in range(offset, END + 2) if n not in model)
    assert spans.stop_after(offset) == expected


@given(RANGES, OFFSETS, OFFSETS)
def test_a_gap_is_the_first_missing_range(
    ranges: list[tuple[int, int]], offset: int, end: int
) -> None:
    spans, model = spans_of(ranges)
    missing = [n for n in range(offset, end) if n not in model]
    gap = spans.gap(offset, end)
    if not missing:
        assert gap is None
        return
    start = missing[0]
    assert gap == (start, next(n for n in range(start, end + 1) if n == end or n in model))


@given(RANGES)
def test_filling_every_gap_makes_one_span(ranges: list[tuple[int, int]]) -> None:
    spans, _ = spans_of(ranges)
    while gap := spans.gap(0, END):
        spans.add(*gap)
    assert list(spans) == [(0, END)]


def test_spans_may_change_while_they_are_read() -> None:
    spans, _ = spans_of([(0, 1), (2, 3)])
    for start, stop in spans:
        spans.add(start + 10, stop + 10)
    assert spans.total == 4
