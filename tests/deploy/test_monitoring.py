"""The dashboard and the alerts: a real Prometheus scrapes a real server, and every expression finds
something."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ociproxy.metrics.counters import COUNTERS, HISTOGRAMS
from ociproxy.serve.admin.exposition import GAUGES
from tests.images import image
from tests.parts.tools import require_tool, run
from tests.server import Mirror, free_port, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

CHECKOUT = Path(__file__).parents[2]
ALERTS = CHECKOUT / "deploy/prometheus/alerts.yaml"
DASHBOARD = CHECKOUT / "deploy/grafana/ociproxy.json"
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "1h"}
LIMIT = 60.0


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def expressions() -> Iterator[str]:
    """Of every panel, as Grafana would send them."""
    for panel in panels():
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            assert "$" not in expression
            yield expression


def test_the_rules_are_right_and_fire_where_they_should() -> None:
    promtool = require_tool("promtool")
    run(promtool, "check", "rules", ALERTS)
    run(promtool, "test", "rules", ALERTS.with_name("alerts_test.yaml"))


def test_each_alert_has_a_line_in_the_runbook_and_a_test() -> None:
    text = (CHECKOUT / "docs/operations.md").read_text(encoding="utf-8")
    section = text.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    names = [rule["alert"] for rule in rules()]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names
    tested = ALERTS.with_name("alerts_test.yaml").read_text(encoding="utf-8")
    assert [name for name in names if f"alertname: {name}\n" not in tested] == []


def test_dashboard_and_alerts_name_metrics_that_there_are() -> None:
    there = {f"{each.name}_total" for each in COUNTERS} | {each.name for each in GAUGES}
    there |= {f"{each.name}_bucket" for each in HISTOGRAMS}
    text = "\n".join([*expressions(), *(rule["expr"] for rule in rules())])
    assert set(re.findall(r"\bociproxy_\w+", text)) <= there


def test_panels_of_the_dashboard_do_not_overlap_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert panel["type"] == "row" or panel["description"]
        taken |= cells


class Prometheus:
    """A real one that scrapes one server every second."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = free_port()
        folder.mkdir()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {"job_name": "ociproxy", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = folder / "log"
        self.command = [
            require_tool("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.log.open("wb") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(LIMIT)

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=LIMIT) as response:
            return json.loads(response.read())["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


def use(server: Mirror, good: FakeUpstream, away: FakeUpstream) -> None:
    """Something of everything that is counted."""
    (layer,) = good.add("app", image(layer_size=50_000), tag="1").layers
    (damaged,) = good.add("damaged", image("damaged"), tag="1").layers
    away.add("app", image("away"), tag="1")
    quota = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "99;w=21600"}
    good.fault("/manifests/", Fault(headers=quota))
    good.fault(damaged.digest, Fault(flip_at=10))
    for upstream in (good, away):
        assert server.manifest(upstream.registry, "app", "1").status == 200
    assert server.blob(good.registry, "app", layer.digest).status == 200
    with contextlib.suppress(http.client.IncompleteRead):
        server.blob(good.registry, "damaged", damaged.digest)
    away.stop_listening()
    assert server.manifest(away.registry, "app", "1").status == 200


@pytest.mark.real
def test_every_expression_of_the_dashboard_finds_data(
    tmp_path: Path, mirror: Callable[..., Mirror], make_upstream: Callable[..., FakeUpstream]
) -> None:
    good, away = make_upstream(), make_upstream()
    config = {
        "upstreams": [upstream_entry(good.url), upstream_entry(away.url)],
        "store": {"max_size": "10G"},
        "tags": [{"match": f"{away.registry}/*", "ttl": "0"}],
    }
    server = mirror(config, admin=True)
    prometheus = Prometheus(tmp_path / "prometheus", server.admin_port)
    use(server, good, away)
    with prometheus.running():
        empty = list(expressions())
        end = time.monotonic() + LIMIT
        while empty and time.monotonic() < end:
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                empty = [each for each in empty if not prometheus.query(each)]
        assert empty == [], prometheus.log.read_text()
        (scraped,) = prometheus.get("targets")["activeTargets"]
        assert (scraped["health"], scraped["lastError"]) == ("up", "")
        (group,) = prometheus.get("rules")["groups"]
        assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(rules())
        assert len(prometheus.query('{__name__=~"ociproxy_.*"}')) < 500
