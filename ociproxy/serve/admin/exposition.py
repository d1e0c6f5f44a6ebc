"""The numbers of this server in the formats of Prometheus: text, or OpenMetrics for who asks.

Tests: tests/serve/admin/test_metrics.py.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from ociproxy import __version__
from ociproxy.errors import StoreError
from ociproxy.metrics.counters import (
    COUNTERS,
    HISTOGRAMS,
    STORED_BYTES,
    STORED_OBJECTS,
    Counter,
    Metric,
)
from ociproxy.serve.live import alive
from ociproxy.store.limits import Limits
from ociproxy.store.passes import SCRUB, Pass, PassFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric as Family

    from ociproxy.config.settings import Config
    from ociproxy.metrics.tally import Key, Tally
    from ociproxy.serve.admin.survey import Findings
    from ociproxy.store.store import Store

BUILD: Final = Metric("ociproxy_build_info", "1, with the version", ("version", "python"))
WORKERS: Final = Metric("ociproxy_workers", "Processes that answer clients")
CONNECTIONS: Final = Metric("ociproxy_connections", "Connections of clients that are open")
FILLS_RUNNING: Final = Metric("ociproxy_fills_running", "Downloads of blobs under way")
FILLS_QUEUED: Final = Metric(
    "ociproxy_fills_queued", "Blobs that wait to be downloaded in the background"
)
AVAILABLE: Final = Metric(
    "ociproxy_upstream_available",
    "1 where a listed upstream may be asked, 0 while it is left alone",
    ("registry",),
)
PAUSE: Final = Metric(
    "ociproxy_upstream_pause_seconds",
    "Seconds until a listed upstream that is left alone is asked again",
    ("registry",),
)
QUOTA_LIMIT: Final = Metric(
    "ociproxy_upstream_quota_limit",
    "Requests that a listed upstream allows in its window, as it last said",
    ("registry",),
)
QUOTA_REMAINING: Final = Metric(
    "ociproxy_upstream_quota_remaining",
    "Requests that a listed upstream still allows in its window, as it last said",
    ("registry",),
)
STORE_BYTES: Final = Metric(
    "ociproxy_store_bytes",
    "Bytes in the store at the last survey, and what this server stored since",
    ("kind",),
)
STORE_OBJECTS: Final = Metric(
    "ociproxy_store_objects",
    "Files in the store at the last survey, and what this server stored since",
    ("kind",),
)
STORE_LIMIT: Final = Metric(
    "ociproxy_store_limit_bytes", "How large store.max_size lets the store be"
)
STORE_STUCK: Final = Metric(
    "ociproxy_store_stuck", "1 while the store exceeds a limit and nothing may be removed"
)
SURVEYED: Final = Metric(
    "ociproxy_store_survey_timestamp_seconds", "When the store was last surveyed"
)
DISK: Final = Metric("ociproxy_disk_bytes", "Size of the file system that the store is on")
DISK_FREE: Final = Metric("ociproxy_disk_free_bytes", "Bytes free for the store")
SCRUBBED: Final = Metric(
    "ociproxy_scrub_ratio", "How much of the store the running scrub has read, 0 to 1"
)
SCRUB_ENDED: Final = Metric(
    "ociproxy_scrub_finished_timestamp_seconds", "When a scrub last came to the end of the store"
)

GAUGES: Final[tuple[Metric, ...]] = (
    BUILD,
    WORKERS,
    CONNECTIONS,
    FILLS_RUNNING,
    FILLS_QUEUED,
    AVAILABLE,
    PAUSE,
    QUOTA_LIMIT,
    QUOTA_REMAINING,
    STORE_BYTES,
    STORE_OBJECTS,
    STORE_LIMIT,
    STORE_STUCK,
    SURVEYED,
    DISK,
    DISK_FREE,
    SCRUBBED,
    SCRUB_ENDED,
)


def expose(
    tally: Tally, disk: Sequence[Family], survey: Findings | None, accept: str
) -> tuple[bytes, str]:
    """The body and its media type, as the Accept header asks. `disk` is from `of_disk`."""
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    totals = tally.totals()
    gauges = [*_gauges(tally), *disk, *_store(survey, totals)]
    registry.register(_Snapshot(totals, gauges))
    return encode(registry), content_type


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """What prometheus_client calls a collector."""

    totals: Mapping[Key, list[float]]
    gauges: Sequence[Family]

    def collect(self) -> Iterator[Family]:
        by_name: dict[str, list[tuple[tuple[str, ...], list[float]]]] = {}
        for (name, *labels), numbers in self.totals.items():
            by_name.setdefault(name, []).append((tuple(labels), numbers))
        for counter in COUNTERS:
            family = CounterMetricFamily(counter.name, counter.meaning, labels=counter.labels)
            found = by_name.get(counter.name, [] if counter.labels else [((), [0.0])])
            for label_values, (value,) in sorted(found):
                family.add_metric(label_values, value)
            yield family
        for histogram in HISTOGRAMS:
            timed = HistogramMetricFamily(
                histogram.name, histogram.meaning, labels=histogram.labels
            )
            bounds = [*(f"{bound:g}" for bound in histogram.buckets), "+Inf"]
            for label_values, (*counts, total) in sorted(by_name.get(histogram.name, [])):
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                timed.add_metric(label_values, buckets, total)
            yield timed
        yield from self.gauges


def _gauges(tally: Tally) -> Iterator[Family]:
    states = alive(tally)
    yield _gauge(BUILD, {(__version__, platform.python_version()): 1})
    yield _gauge(WORKERS, {(): len(states)})
    yield _gauge(CONNECTIONS, {(): sum(each["connections"] for each in states)})
    yield _gauge(FILLS_RUNNING, {(): sum(each["fills"]["running"] for each in states)})
    yield _gauge(FILLS_QUEUED, {(): sum(each["fills"]["queued"] for each in states)})
    upstreams = [each for state in states for each in state["upstreams"] if each["listed"]]
    # Each worker finds out by itself; the operator wants to hear of the one that is cut off.
    pauses: dict[tuple[str, ...], float] = {}
    quotas: dict[tuple[str, ...], dict[str, Any]] = {}
    for each in upstreams:
        label = (each["registry"],)
        pauses[label] = max(pauses.get(label, 0.0), each["seconds"])
        quota = each.get("quota")
        if quota is not None and quota["at"] >= quotas.get(label, quota)["at"]:
            quotas[label] = quota
    # Where the pause is over the next request may ask, which may come tomorrow.
    away = {
        (each["registry"],)
        for each in upstreams
        if each["condition"] not in ("available", "probing")
    }
    yield _gauge(AVAILABLE, {label: int(label not in away) for label in pauses})
    yield _gauge(PAUSE, pauses)
    yield _gauge(QUOTA_LIMIT, {label: quota["limit"] for label, quota in quotas.items()})
    yield _gauge(QUOTA_REMAINING, {label: quota["remaining"] for label, quota in quotas.items()})


def of_disk(config: Config, store: Store) -> list[Family]:
    """What the disk tells now. Blocks, for as long as the disk hangs."""
    return [*_disk(config, store)]


def _disk(config: Config, store: Store) -> Iterator[Family]:
    with suppress(StoreError):
        limits = Limits.of(config.store, store.root)
        yield _gauge(DISK, {(): limits.total})
        yield _gauge(DISK_FREE, {(): limits.free})
        if limits.max_size is not None:
            yield _gauge(STORE_LIMIT, {(): limits.max_size})
        usage = store.usage.read()
        yield _gauge(STORE_STUCK, {(): int(usage is not None and usage.stuck > 0)})
        scrub = PassFile(store, SCRUB).read() or Pass()
        yield _gauge(SCRUBBED, {(): scrub.part})
        if scrub.ended:
            yield _gauge(SCRUB_ENDED, {(): scrub.ended})


def _store(survey: Findings | None, totals: Mapping[Key, list[float]]) -> Iterator[Family]:
    """Nothing is known before the first survey."""
    if survey is None:
        return

    def grown(counter: Counter, kind: str) -> float:
        key = (counter.name, kind)
        return totals.get(key, [0.0])[0] - survey.stored.get(key, [0.0])[0]

    held = survey.held.items()
    yield _gauge(STORE_BYTES, {(k,): each.bytes + grown(STORED_BYTES, k) for k, each in held})
    yield _gauge(STORE_OBJECTS, {(k,): each.objects + grown(STORED_OBJECTS, k) for k, each in held})
    yield _gauge(SURVEYED, {(): survey.at})


def _gauge(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Family:
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family
