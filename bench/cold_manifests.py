"""Manifests that no client asked for before, by tag: from the upstream, into the store.

Two more rivals take part where they are in `PATH`, and a floor: what the libraries alone take.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from bench.clients import take_all
from bench.images import MANY, lay_out_manifests
from bench.processes import settle
from bench.servers import (
    DISTRIBUTION,
    FLOOR,
    OCIPROXY,
    OCIREGISTRY,
    Rival,
    Upstream,
    find,
    registry_proxy,
    start_static_upstream,
    two_workers,
)
from bench.serving import Bench

CONNECTIONS = 32
LIMIT = 60.0
"""Seconds that one server may take."""


def cold_manifests(bench: Bench) -> None:
    static = bench.work / "many"
    tags = lay_out_manifests(static, bench.plan.cold_manifests)
    upstream = start_static_upstream(bench.work / "many-upstream", static)
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    cost: dict[tuple[str, str], list[float]] = defaultdict(list)
    servers = [("cold_manifests", rival) for rival in (*bench.proxies, *further_rivals())]
    if any(rival.name == OCIPROXY for rival in bench.proxies):
        servers.append(("cold_manifests_2", two_workers()))
    try:
        for _ in bench.plan.rounds_of(bench.plan.rounds):
            for row, rival in servers:
                with (
                    bench.attempt("cold manifests", rival.name),
                    rival.cold(bench.work, upstream) as running,
                ):
                    paths = [running.target.manifest(MANY, tag) for tag in tags]
                    settle(running.process, upstream.process)
                    cpu = running.process.cpu_seconds()
                    seconds = take_all(
                        running.target.port, paths, connections=CONNECTIONS, limit=LIMIT
                    )
                    settle(running.process, upstream.process)
                    spent = running.process.cpu_seconds() - cpu
                    cost[row, rival.name].append(spent / len(tags))
                    rates[row, rival.name].append(len(tags) / seconds)
    finally:
        upstream.process.stop()
    for (row, name), values in rates.items():
        bench.results.put(row, name, max(values))
        bench.results.put(f"{row}_cpu", name, min(cost[row, name]) * 1e6)


def further_rivals() -> list[Rival]:
    return [
        Rival(OCIREGISTRY, _ociregistry, by_namespace=True),
        Rival(DISTRIBUTION, _distribution),
        Rival(FLOOR, _floor),
    ]


def _ociregistry(directory: Path, port: int, upstream: Upstream) -> list[str]:
    config = directory / "config.yaml"
    config.write_text(f'registries: [{{name: "{upstream.host}", scheme: http}}]\n')
    settings = ["--config-file", str(config), "--image-path", str(directory / "store")]
    return [find(OCIREGISTRY), *settings, "serve", "--host", "127.0.0.1", "--port", str(port)]


def _distribution(directory: Path, port: int, upstream: Upstream) -> list[str]:
    return registry_proxy("registry", directory, port, upstream)


def _floor(directory: Path, port: int, upstream: Upstream) -> list[str]:
    store = directory / "store"
    store.mkdir()
    return [sys.executable, "-m", "bench.floor", str(port), upstream.host, str(store)]
