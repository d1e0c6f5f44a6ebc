"""What is counted: each metric with its meaning, and the calls that count.

Names follow the conventions of Prometheus, without the `_total` that its format adds to a counter.
A label has few values: a registry that the operator did not list is `other`. Counting takes about a
microsecond and waits for nothing; `tally` keeps the numbers. docs/metrics.md has the same list,
which a test compares.

Tests: tests/metrics/test_tally.py, tests/serve/admin/test_metrics.py, tests/test_docs.py.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from ociproxy.metrics.tally import LOST, Tally

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0, 600.0)
"""Upper bounds of the buckets, from a warm manifest to a large layer over a slow line."""

_tally = Tally(1)


def share(rows: int) -> Tally:
    """Count in memory that forked processes share from now on, with a row for each of them. The
    caller is the first row; each other process calls `Tally.use`."""
    global _tally
    _tally = Tally.shared(rows)
    return _tally


def join(file: int) -> None:
    """Count in the memory of the server that this process is a child of: `file` is its tally's."""
    global _tally
    joined = Tally.joined(file)
    if joined is not None:
        _tally = joined


def inherited() -> tuple[int, ...]:
    """The file descriptors that a child process needs to `join`."""
    return () if _tally.file < 0 else (_tally.file,)


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    meaning: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    def add(self, *labels: str, by: float = 1.0) -> None:
        """Thread-safe."""
        _tally.add((self.name, *labels), by)


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """Its numbers are one for each bucket and one for what is above all of them, then the sum."""

    buckets: tuple[float, ...] = _SECONDS

    def observe(self, value: float, *labels: str) -> None:
        """Thread-safe."""
        bounds = self.buckets
        _tally.observe((self.name, *labels), bisect_left(bounds, value), len(bounds) + 1, value)


REQUESTS: Final = Counter(
    "ociproxy_requests",
    "Requests of clients below /v2/, counted when the head of the answer is ready",
    ("kind", "outcome", "status"),
)
RESPONSE_BYTES: Final = Counter(
    "ociproxy_response_bytes", "Bytes of bodies sent to clients", ("kind", "outcome")
)
REQUEST_SECONDS: Final = Histogram(
    "ociproxy_request_seconds",
    "Seconds from a request's head to the last byte of its answer",
    ("kind",),
)
FIRST_BYTE_SECONDS: Final = Histogram(
    "ociproxy_first_byte_seconds",
    "Seconds from a request's head to the head of its answer",
    ("outcome",),
)
RESPONSES_CUT: Final = Counter(
    "ociproxy_responses_cut",
    "Answers that ended before their last byte: the client left, or the mirror cut them",
    ("by",),
)
STALE_ANSWERS: Final = Counter(
    "ociproxy_stale_answers",
    "Answers with expired content, because the upstream could not be asked",
    ("reason",),
)
UPSTREAM_REQUESTS: Final = Counter(
    "ociproxy_upstream_requests",
    "Requests to upstreams; the status is 429, a class such as 2xx, or error without an answer",
    ("registry", "status"),
)
UPSTREAM_SECONDS: Final = Counter(
    "ociproxy_upstream_wait_seconds",
    "Seconds of waiting for the heads of upstreams' answers",
    ("registry",),
)
UPSTREAM_BYTES: Final = Counter(
    "ociproxy_upstream_bytes", "Bytes of bodies that upstreams sent", ("registry",)
)
FILLS: Final = Counter("ociproxy_fills", "Downloads of blobs that ended in the store")
FILLS_FAILED: Final = Counter(
    "ociproxy_fills_failed", "Downloads of blobs that ended with an error", ("reason",)
)
FILLS_RESUMED: Final = Counter(
    "ociproxy_fills_resumed", "Downloads of blobs that went on from bytes that were there"
)
STORED_BYTES: Final = Counter(
    "ociproxy_stored_bytes", "Bytes that this server put into the store", ("kind",)
)
STORED_OBJECTS: Final = Counter(
    "ociproxy_stored_objects", "Files that this server put into the store", ("kind",)
)
EVICTED_IMAGES: Final = Counter(
    "ociproxy_evicted_images", "Images that were removed to keep the store's limits"
)
EVICTED_BYTES: Final = Counter(
    "ociproxy_evicted_bytes", "Bytes that were removed to keep the store's limits"
)
CHILDREN: Final = Counter(
    "ociproxy_child_runs",
    "Processes that look after the store: ok, failed, or busy where another one did it",
    ("task", "result"),
)
WORKERS_DIED: Final = Counter(
    "ociproxy_workers_died", "Processes of this server that died and were replaced"
)
SERIES_LOST: Final = Counter(
    LOST[0], "Series that found no room in the shared memory; anything but 0 is a bug"
)


def count_answer(kind: str, outcome: str, status: int, seconds: float) -> None:
    """A request was answered, so many seconds after its head. Called before the answer is sent: no
    client has an answer that is not counted. In the event loop's thread only, without a lock."""
    values = _tally.values
    places = _tally.found.get((kind, outcome, status))
    if places is None:
        places = _tally.find(
            (kind, outcome, status),
            ((REQUESTS.name, kind, outcome, _status_class(status)), 1),
            ((FIRST_BYTE_SECONDS.name, outcome), len(_SECONDS) + 2),
        )
    request, first_byte = places
    values[request] += 1
    values[first_byte + bisect_left(_SECONDS, seconds)] += 1
    values[first_byte + len(_SECONDS) + 1] += seconds


def count_end(kind: str, outcome: str, sent: int, seconds: float) -> None:
    """The answer's body has been sent, or handed on to be, in so many bytes and seconds. In the
    event loop's thread only, without a lock."""
    values = _tally.values
    places = _tally.found.get((kind, outcome))
    if places is None:
        places = _tally.find(
            (kind, outcome),
            ((RESPONSE_BYTES.name, kind, outcome), 1),
            ((REQUEST_SECONDS.name, kind), len(_SECONDS) + 2),
        )
    total, ended = places
    values[total] += sent
    values[ended + bisect_left(_SECONDS, seconds)] += 1
    values[ended + len(_SECONDS) + 1] += seconds


def _status_class(status: int) -> str:
    return f"{status // 100}xx" if status else "none"


def count_stored(kind: str, size: int) -> None:
    """A file of so many bytes was put into the store: a blob, an index or a manifest."""
    STORED_OBJECTS.add(kind)
    STORED_BYTES.add(kind, by=size)


COUNTERS: Final[tuple[Counter, ...]] = (
    REQUESTS,
    RESPONSE_BYTES,
    RESPONSES_CUT,
    STALE_ANSWERS,
    UPSTREAM_REQUESTS,
    UPSTREAM_SECONDS,
    UPSTREAM_BYTES,
    FILLS,
    FILLS_FAILED,
    FILLS_RESUMED,
    STORED_BYTES,
    STORED_OBJECTS,
    EVICTED_IMAGES,
    EVICTED_BYTES,
    CHILDREN,
    WORKERS_DIED,
    SERIES_LOST,
)
HISTOGRAMS: Final[tuple[Histogram, ...]] = (REQUEST_SECONDS, FIRST_BYTE_SECONDS)
