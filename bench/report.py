"""The tables, the targets beside what was measured, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.archive import TOOLS
from bench.load import SKOPEO_COPY, SKOPEO_SYNC
from bench.results import Results
from bench.servers import (
    DISTRIBUTION,
    DRAYAGE,
    FLOOR,
    NGINX,
    OCIPROXY,
    OCIREGISTRY,
    REGISTRY,
    UPSTREAM,
)

Cells = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    key: str
    label: str
    unit: str
    decimals: int


@dataclass(frozen=True)
class Section:
    """A table: the rows of what the same rivals were measured in."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


SERVING = (
    Row("start", "start to first answer", "ms", 0),
    Row("warm_1", "warm blob, 1 client", "GB/s", 2),
    Row("warm_1_cpu", "  server CPU", "s/GB", 3),
    Row("warm_8", "warm blob, 8 clients", "GB/s", 2),
    Row("warm_8_cpu", "  server CPU", "s/GB", 3),
    Row("manifest_tag", "warm manifest by tag", "req/s", 0),
    Row("manifest_tag_cpu", "  server CPU", "us/req", 1),
    Row("manifest_digest", "warm manifest by digest", "req/s", 0),
    Row("manifest_digest_cpu", "  server CPU", "us/req", 1),
    Row("cold_first", "cold blob, first byte", "ms", 1),
    Row("cold_total", "cold blob, total", "s", 3),
    Row("cold_upstream", "cold blob, upstream bytes / size", "x", 2),
    Row("cold_tls", "cold blob over TLS, total", "s", 3),
    Row("cold_tls_cpu", "  server CPU", "s/GB", 2),
    Row("stampede_wall", "32 cold clients, wall time", "s", 2),
    Row("stampede_first", "32 cold clients, worst first byte", "ms", 0),
    Row("stampede_upstream", "32 cold clients, upstream bytes / size", "x", 2),
    Row("stampede_peak", "32 cold clients, peak RSS", "MB", 1),
    Row("beside_listed", "cold blobs beside bad upstreams, first byte", "ms", 1),
    Row("beside_listed_worst", "  worst", "ms", 1),
    Row("beside_unlisted", "  median, no upstream listed", "ms", 1),
    Row("beside_unlisted_worst", "  worst, no upstream listed", "ms", 1),
    Row("rss_idle", "RSS idle, just started", "MB", 1),
    Row("rss_after", "RSS idle, after the rows above", "MB", 1),
    Row("slow_warm", "256 slow clients, warm, peak RSS", "MB", 1),
    Row("slow_cold", "256 slow clients, cold, peak RSS", "MB", 1),
)
COLD_MANIFESTS = (
    Row("cold_manifests", "cold manifests by tag", "req/s", 0),
    Row("cold_manifests_cpu", "  server CPU", "us/req", 0),
    Row("cold_manifests_2", "  with two workers", "req/s", 0),
    Row("cold_manifests_2_cpu", "  their CPU", "us/req", 0),
)
LOADED = (20, 100)
LOADING = tuple(
    row
    for count in LOADED
    for row in (
        Row(f"load_{count}", f"load of {count} images", "s", 2),
        Row(f"load_{count}_cpu", "  CPU", "s", 2),
        Row(f"load_{count}_upstream", "  upstream bytes / different ones", "x", 2),
    )
)
ARCHIVES = (
    Row("import", "import", "s", 2),
    Row("import_rate", "  rate", "GB/s", 2),
    Row("import_peak", "  peak RSS", "MB", 1),
    Row("export", "export", "s", 2),
    Row("export_rate", "  rate", "GB/s", 2),
    Row("export_peak", "  peak RSS", "MB", 1),
)
SCALE = (
    *(
        row
        for key, label in (
            ("scale_list", "large store: list"),
            ("scale_check", "large store: check --quick"),
            ("scale_prune", "large store: a prune's plan"),
        )
        for row in (Row(key, label, "s", 1), Row(f"{key}_cpu", "  CPU", "s", 1))
    ),
    Row("scale_idle_p99", "warm manifest, p99, server idle", "ms", 2),
    Row("scale_p99", "  beside these commands", "ms", 2),
    Row("scale_rss", "server's RSS beside them, above idle", "MB", 1),
    Row("scale_scrape_idle", "scrape of the metrics, median, server idle", "ms", 1),
    Row("scale_scrape_idle_worst", "  worst", "ms", 1),
    Row("scale_scrape", "  median, beside these commands", "ms", 1),
    Row("scale_scrape_worst", "  worst", "ms", 1),
    Row("scale_page", "page of the contents: until it lists them", "s", 1),
    Row("scale_page_worst", "  longest answer", "ms", 1),
    Row("scale_page_rss", "  server's RSS for it, above idle", "MB", 1),
)
COUNTING = (
    Row("counted", "warm manifest, server CPU", "us/req", 1),
    Row("uncounted", "  while it counts nothing", "us/req", 1),
    Row("counting", "  what counting takes of it", "%", 1),
)
SECTIONS = (
    Section((OCIPROXY, REGISTRY, DRAYAGE, NGINX, UPSTREAM), SERVING),
    Section((OCIPROXY, OCIREGISTRY, DISTRIBUTION, REGISTRY, DRAYAGE, FLOOR), COLD_MANIFESTS),
    Section((OCIPROXY, OCIREGISTRY, SKOPEO_COPY, SKOPEO_SYNC), LOADING),
    Section((OCIPROXY, *TOOLS), ARCHIVES),
    Section((OCIPROXY,), SCALE),
    Section((OCIPROXY,), COUNTING),
)


@dataclass(frozen=True)
class Target:
    """`value` computes what is compared with `bound`; a missing cell raises KeyError."""

    label: str
    value: Callable[[Cells], float]
    relation: Literal[">=", "<=", "="]
    bound: float
    unit: str = "x"

    def wanted(self) -> str:
        return f"{self.relation} {self.bound:g} {self.unit}"

    def measured(self, cells: Cells) -> float | None:
        try:
            return self.value(cells)
        except (KeyError, ZeroDivisionError):
            return None

    def met(self, value: float) -> bool:
        if self.relation == "=":
            # To the two decimals that are printed: less would mean bytes that were not counted.
            return abs(value - self.bound) < 0.005
        return value >= self.bound if self.relation == ">=" else value <= self.bound


def _ratio(row: str, over: str, under: str) -> Callable[[Cells], float]:
    return lambda cells: cells[row][over] / cells[row][under]


def _own(row: str) -> Callable[[Cells], float]:
    return lambda cells: cells[row][OCIPROXY]


def _to_fastest(count: int) -> Callable[[Cells], float]:
    def ratio(cells: Cells) -> float:
        row = cells[f"load_{count}"]
        others = (value for name, value in row.items() if name != OCIPROXY)
        return row[OCIPROXY] / min(others, default=0.0)

    return ratio


TARGETS = (
    Target("warm blob, 8 clients, to nginx static", _ratio("warm_8", OCIPROXY, NGINX), ">=", 0.8),
    Target(f"warm blob, 8 clients, to {REGISTRY}", _ratio("warm_8", OCIPROXY, REGISTRY), ">=", 1.8),
    Target(
        f"warm manifest by tag, to {REGISTRY}",
        _ratio("manifest_tag", OCIPROXY, REGISTRY),
        ">=",
        30,
    ),
    Target("cold manifests by tag", _own("cold_manifests"), ">=", 1000, "req/s"),
    Target("  with two workers", _own("cold_manifests_2"), ">=", 1000, "req/s"),
    *(
        Target(
            f"cold manifests by tag, to {name}", _ratio("cold_manifests", OCIPROXY, name), ">=", 1
        )
        for name in (REGISTRY, DISTRIBUTION, OCIREGISTRY, DRAYAGE)
    ),
    Target(
        "cold blob, first byte later than direct",
        lambda cells: cells["cold_first"][OCIPROXY] - cells["cold_first"][UPSTREAM],
        "<=",
        15,
        "ms",
    ),
    Target(f"cold blob, total, to {REGISTRY}", _ratio("cold_total", OCIPROXY, REGISTRY), "<=", 1.0),
    Target("cold blob, upstream bytes / size", _own("cold_upstream"), "=", 1.0),
    Target("cold blob over TLS, server CPU", _own("cold_tls_cpu"), "<=", 3.5, "s/GB"),
    Target(
        f"32 cold clients, {REGISTRY}'s time to ours",
        _ratio("stampede_wall", REGISTRY, OCIPROXY),
        ">=",
        2,
    ),
    Target("32 cold clients, worst first byte", _own("stampede_first"), "<=", 200, "ms"),
    Target("32 cold clients, upstream bytes / size", _own("stampede_upstream"), "=", 1.0),
    Target("32 cold clients, peak RSS", _own("stampede_peak"), "<=", 90, "MB"),
    *(
        Target(
            f"cold blobs beside {kind} bad upstreams, worst first byte",
            _own(f"beside_{kind}_worst"),
            "<=",
            1000,
            "ms",
        )
        for kind in ("listed", "unlisted")
    ),
    Target("RSS idle", _own("rss_idle"), "<=", 60, "MB"),
    Target("256 slow clients, warm, peak RSS", _own("slow_warm"), "<=", 90, "MB"),
    Target("256 slow clients, cold, peak RSS", _own("slow_cold"), "<=", 90, "MB"),
    *(
        target
        for count in LOADED
        for target in (
            Target(f"load of {count}, to the fastest other way", _to_fastest(count), "<=", 1.0),
            Target(
                f"load of {count}, upstream bytes / different ones",
                _own(f"load_{count}_upstream"),
                "=",
                1.0,
            ),
        )
    ),
    *(
        Target(f"{what}, time of {tool} to ours", _ratio(what, tool, OCIPROXY), ">=", 0.8)
        for what in ("import", "export")
        for tool in TOOLS
    ),
    *(
        Target(f"large store, {what}", _own(f"scale_{what}"), "<=", 30, "s")
        for what in ("list", "check", "prune")
    ),
    Target(
        "large store, p99 of warm manifests beside them to idle",
        lambda cells: cells["scale_p99"][OCIPROXY] / cells["scale_idle_p99"][OCIPROXY],
        "<=",
        2,
    ),
    Target("large store, server's RSS above idle", _own("scale_rss"), "<=", 5, "MB"),
    Target("large store, scrape of the metrics, idle", _own("scale_scrape_idle"), "<=", 50, "ms"),
    Target("large store, scrape beside these commands", _own("scale_scrape"), "<=", 50, "ms"),
    Target("counting, of a warm manifest's CPU", _own("counting"), "<=", 3, "%"),
    Target("import, peak RSS", _own("import_peak"), "<=", 90, "MB"),
    Target("export, peak RSS", _own("export_peak"), "<=", 90, "MB"),
)


def table(results: Results, *, size: int, seconds: float) -> str:
    machine = f"{os.cpu_count()} cores, {_python()}"
    lines = [f"{machine}, {size >> 20} MiB blob, {seconds:.0f} s", ""]
    for section in SECTIONS:
        rows = [row for row in section.rows if row.key in results.cells]
        if rows:
            lines += _grid(
                ["", "", *section.columns],
                [
                    [row.label, row.unit, *(_cell(results, row, name) for name in section.columns)]
                    for row in rows
                ],
            )
            lines.append("")
    measured = [(target, target.measured(results.cells)) for target in TARGETS]
    lines += _grid(
        ["target", "wanted", "measured", ""],
        [
            [
                target.label,
                target.wanted(),
                "-" if value is None else f"{value:.2f} {target.unit}",
                "not measured" if value is None else "met" if target.met(value) else "NOT MET",
            ]
            for target, value in measured
        ],
    )
    lines += ["", *(f"note: {note}" for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


def write_json(path: Path, results: Results, *, size: int, seconds: float) -> None:
    targets = []
    for target in TARGETS:
        value = target.measured(results.cells)
        targets.append(
            {
                "target": target.label,
                "wanted": target.wanted(),
                "measured": value,
                "met": None if value is None else target.met(value),
            }
        )
    document = {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": _python()},
        "blob_bytes": size,
        "seconds": round(seconds, 1),
        "rows": [
            {"row": row.key, "label": row.label.strip(), "unit": row.unit, **results.cells[row.key]}
            for section in SECTIONS
            for row in section.rows
            if row.key in results.cells
        ],
        "targets": targets,
        "notes": results.notes,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _python() -> str:
    """Which interpreter serves; how it was built decides what a manifest costs."""
    return f"Python {platform.python_version()} in {sys.base_prefix}"


def _cell(results: Results, row: Row, server: str) -> str:
    """A number; `missing` for a server that did not start; `-` for a row that is not its own."""
    if server in results.missing:
        return "missing"
    value = results.cells[row.key].get(server)
    return "-" if value is None else f"{value:,.{row.decimals}f}"


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """The first column reads from the left, the numbers from the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *rows]
    ]
