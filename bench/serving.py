"""The measurements of serving. Each fills some rows for every server that takes part in it.

Rounds go over all servers before the next round begins, so that noise of the machine hits all
alike. Rates are the best pass, cold times the median; a failure costs one server its cells.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.clients import Download, Request, download, trickle, wrk
from bench.images import REPOSITORIES, TAG, Images, verify
from bench.processes import BenchError, settle
from bench.results import Plan, Results, say
from bench.servers import (
    DRAYAGE,
    UPSTREAM,
    Rival,
    Running,
    Target,
    Upstream,
    start_tls_upstream,
)

STAMPEDE_CLIENTS = 32
SLOW_CLIENTS = 256
SLOW_RATE = 64 << 10
DOWNLOAD_LIMIT = 60.0
WARM_CLIENTS = (1, 8)
# What takes longer is measured once: its ratio is clear, and the run has a bound.
ONCE_STAMPEDE_SECONDS = 8.0
ONCE_PASS_SECONDS = 2.0


@dataclass
class Bench:
    work: Path
    upstream: Upstream
    images: Images
    rivals: list[Rival]
    warm: dict[str, Running]
    plan: Plan
    results: Results

    @contextlib.contextmanager
    def attempt(self, row: str, server: str) -> Iterator[None]:
        try:
            yield
        except BenchError as error:
            self.results.note(f"{row}, {server}: {error}")

    @property
    def proxies(self) -> list[Rival]:
        return [rival for rival in self.rivals if rival.proxies and rival.name in self.warm]

    def blob_requests(self, target: Target, clients: int) -> list[Request]:
        """Clients spread over the repositories that hold the blob."""
        names = [REPOSITORIES[i % len(REPOSITORIES)] for i in range(clients)]
        return [Request(target.port, target.blob(name, self.images.blob)) for name in names]

    def upstream_ratio(self, mark: int) -> float:
        return self.upstream.blob_bytes(mark, self.images.blob) / self.images.size


def start_warm(bench: Bench, stack: contextlib.ExitStack) -> None:
    """Start every rival, note what it costs idle, then fill and check its store."""
    for rival in bench.rivals:
        directory = bench.work / rival.name.replace(" ", "-")
        directory.mkdir()
        try:
            running = rival.start(directory, bench.upstream)
            stack.callback(running.process.stop)
            time.sleep(0.5)
            bench.results.put("rss_idle", rival.name, running.process.rss())
            verify(running.target, bench.images)
        except BenchError as error:
            bench.results.missing.add(rival.name)
            bench.results.note(f"{rival.name} is missing: {error}")
            continue
        settle(running.process, bench.upstream.process)
        bench.warm[rival.name] = running
        say(f"  {rival.name}: warm and verified")


def start_time(bench: Bench) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in bench.plan.rounds_of(bench.plan.rounds):
        for rival in bench.rivals:
            if rival.name not in bench.warm:
                continue
            with (
                bench.attempt("start", rival.name),
                rival.cold(bench.work, bench.upstream) as running,
            ):
                samples[rival.name].append(running.process.first_answer * 1000)
    for name, values in samples.items():
        bench.results.put("start", name, statistics.median(values))


def warm_blob(bench: Bench) -> None:
    """Whole passes of N connections until the round has lasted long enough to count its CPU.

    The rate is that of the median pass: on two cores, where scheduler and caches put server and
    client changes one pass by a factor of two, so that the best one is a matter of luck.
    """
    mark = bench.upstream.mark()
    for clients in WARM_CLIENTS:
        cost: dict[str, list[tuple[float, float]]] = defaultdict(list)
        passes: dict[str, list[float]] = defaultdict(list)
        gigabytes = clients * bench.images.size / 1e9
        for _ in bench.plan.rounds_of(bench.plan.warm_rounds):
            for name, running in bench.warm.items():
                if max(passes[name], default=0.0) > ONCE_PASS_SECONDS:
                    continue
                with bench.attempt(f"warm blob, {clients} clients", name):
                    cpu = running.process.cpu_seconds()
                    requests = _same_repository(bench.blob_requests(running.target, clients))
                    seconds = _passes(requests, bench.plan)
                    passes[name] += seconds
                    spent = running.process.cpu_seconds() - cpu
                    cost[name].append((spent, gigabytes * len(seconds)))
        for name, columns in cost.items():
            bench.results.put(f"warm_{clients}", name, gigabytes / statistics.median(passes[name]))
            spent, done = (sum(column) for column in zip(*columns, strict=True))
            bench.results.put(f"warm_{clients}_cpu", name, spent / done)
    if bench.upstream_ratio(mark) > 0:
        bench.results.note("a warm blob was fetched from the upstream again")


def _same_repository(requests: Sequence[Request]) -> list[Request]:
    """The static files exist in the first repository only."""
    return [requests[0]] * len(requests)


def _passes(requests: Sequence[Request], plan: Plan) -> list[float]:
    seconds: list[float] = []
    while sum(seconds) < plan.warm_seconds:
        start = time.perf_counter()
        download(requests, limit=DOWNLOAD_LIMIT)
        seconds.append(time.perf_counter() - start)
    return seconds


def manifests(bench: Bench) -> None:
    for row, reference in (("tag", TAG), ("digest", bench.images.manifest)):
        best: dict[str, float] = {}
        cost: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for _ in bench.plan.rounds_of(bench.plan.warm_rounds):
            for name, running in bench.warm.items():
                with bench.attempt(f"manifest by {row}", name):
                    cpu = running.process.cpu_seconds()
                    path = running.target.manifest(REPOSITORIES[0], reference)
                    rate = wrk(Request(running.target.port, path), seconds=bench.plan.wrk_seconds)
                    cost[name].append((running.process.cpu_seconds() - cpu, rate.requests))
                    best[name] = max(best.get(name, 0.0), rate.per_second)
        for name, per_second in best.items():
            bench.results.put(f"manifest_{row}", name, per_second)
            spent, done = (sum(column) for column in zip(*cost[name], strict=True))
            bench.results.put(f"manifest_{row}_cpu", name, spent / done * 1e6)


def cold_blob(bench: Bench) -> None:
    samples = _cold_rounds(bench, "cold", bench.proxies, clients=1, rounds=bench.plan.cold_rounds)
    for name, runs in samples.items():
        first = statistics.median(run.downloads[0].first_byte for run in runs)
        bench.results.put("cold_first", name, first * 1000)
        bench.results.put("cold_total", name, statistics.median(r.downloads[0].total for r in runs))
        bench.results.put("cold_upstream", name, max(run.upstream for run in runs))


def cold_tls(bench: Bench) -> None:
    """A cold blob from an upstream over TLS: what the server's processor does for each byte."""
    upstream = start_tls_upstream(bench.work / "tls", bench.work / "upstream" / "store")
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        for _ in bench.plan.rounds_of(bench.plan.cold_rounds):
            for rival in bench.proxies:
                if rival.name == DRAYAGE:
                    continue  # it trusts no authority but the public ones
                with (
                    bench.attempt("cold blob over TLS", rival.name),
                    rival.cold(bench.work, upstream) as running,
                ):
                    settle(running.process, upstream.process)
                    cpu = running.process.cpu_seconds()
                    requests = bench.blob_requests(running.target, 1)
                    total = download(requests, limit=DOWNLOAD_LIMIT)[0].total
                    settle(running.process, upstream.process)
                    spent = running.process.cpu_seconds() - cpu
                    samples[rival.name].append((total, spent / bench.images.size * 1e9))
    finally:
        upstream.process.stop()
    for name, runs in samples.items():
        bench.results.put("cold_tls", name, statistics.median(total for total, _ in runs))
        bench.results.put("cold_tls_cpu", name, statistics.median(spent for _, spent in runs))


def stampede(bench: Bench) -> None:
    rounds = min(3, bench.plan.rounds)
    rivals = [
        rival for rival in bench.proxies if rival.name != DRAYAGE or bench.plan.stampede_of_drayage
    ]
    samples = _cold_rounds(bench, "stampede", rivals, clients=STAMPEDE_CLIENTS, rounds=rounds)
    for name, runs in samples.items():
        wall = [max(one.total for one in run.downloads) for run in runs]
        bench.results.put("stampede_wall", name, statistics.median(wall))
        # "Every first byte": the worst client of the worst round.
        worst = max(one.first_byte for run in runs for one in run.downloads)
        bench.results.put("stampede_first", name, worst * 1000)
        bench.results.put("stampede_upstream", name, max(run.upstream for run in runs))
        if name != UPSTREAM:
            bench.results.put("stampede_peak", name, max(run.peak for run in runs))


@dataclass(frozen=True)
class _ColdRun:
    downloads: list[Download]
    upstream: float
    peak: float


def _cold_rounds(
    bench: Bench, row: str, rivals: Sequence[Rival], *, clients: int, rounds: int
) -> dict[str, list[_ColdRun]]:
    samples: dict[str, list[_ColdRun]] = defaultdict(list)
    for _ in bench.plan.rounds_of(rounds):
        with bench.attempt(row, UPSTREAM):
            process = bench.upstream.process
            running = Running(process, bench.upstream.target)
            samples[UPSTREAM].append(_cold_run(bench, running, clients))
        for rival in rivals:
            last = samples[rival.name][-1:]
            if last and max(one.total for one in last[0].downloads) > ONCE_STAMPEDE_SECONDS:
                continue
            with (
                bench.attempt(row, rival.name),
                rival.cold(bench.work, bench.upstream) as running,
            ):
                samples[rival.name].append(_cold_run(bench, running, clients))
    return {name: runs for name, runs in samples.items() if runs}


def _cold_run(bench: Bench, running: Running, clients: int) -> _ColdRun:
    settle(running.process, bench.upstream.process)
    running.process.reset_peak()
    mark = bench.upstream.mark()
    requests = bench.blob_requests(running.target, clients)
    downloads = download(requests, limit=DOWNLOAD_LIMIT)
    settle(running.process, bench.upstream.process)
    return _ColdRun(downloads, bench.upstream_ratio(mark), running.process.peak())


def memory(bench: Bench) -> None:
    """Slow clients cost no CPU worth naming; one server at a time all the same."""
    for name, running in bench.warm.items():
        bench.results.put("rss_after", name, running.process.rss())
        with bench.attempt("slow clients, warm", name):
            requests = _same_repository(bench.blob_requests(running.target, SLOW_CLIENTS))
            bench.results.put("slow_warm", name, _slow_peak(bench, running, requests))
    for rival in bench.proxies:
        with (
            bench.attempt("slow clients, cold", rival.name),
            rival.cold(bench.work, bench.upstream) as running,
        ):
            requests = bench.blob_requests(running.target, SLOW_CLIENTS)
            bench.results.put("slow_cold", rival.name, _slow_peak(bench, running, requests))


def _slow_peak(bench: Bench, running: Running, requests: Sequence[Request]) -> float:
    running.process.reset_peak()
    served = trickle(requests, rate=SLOW_RATE, seconds=bench.plan.slow_seconds)
    if served < len(requests):
        bench.results.note(
            f"{running.target.name}: {served} of {len(requests)} slow clients got a byte"
        )
    return running.process.peak()


SERVING: dict[str, Callable[[Bench], None]] = {
    "start": start_time,
    "warm-blob": warm_blob,
    "manifests": manifests,
    "cold": cold_blob,
    "cold-tls": cold_tls,
    "stampede": stampede,
    "memory": memory,
}
