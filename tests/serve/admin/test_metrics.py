"""What /metrics says: the numbers that clients would count themselves, in few series."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ociproxy.config.settings import Config
from ociproxy.metrics.counters import COUNTERS, HISTOGRAMS, share
from ociproxy.serve.admin.exposition import GAUGES, expose, of_disk
from ociproxy.store.passes import SCRUB, Pass, PassFile, position_at
from ociproxy.store.store import Store
from tests.images import image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

CLIENTS = 8
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
READ = "ociproxy_scrub_ratio"
ENDED = "ociproxy_scrub_finished_timestamp_seconds"
LIMIT = 60.0
"""Seconds for what a child process does: it yields to all others, of a busy machine too."""
BROKEN = (OSError, http.client.HTTPException)


def started(mirror: Callable[..., Mirror], upstream: FakeUpstream, **serve: object) -> Mirror:
    config = {"serve": serve, "upstreams": [upstream_entry(upstream.url)]}
    return mirror(config, admin=True)


def client(
    server: Mirror, paths: list[str], rounds: int, finished: Counter[str], broken: Counter[str]
) -> None:
    """Asks over one connection as long as that holds, and counts the answers it has whole."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    for number in range(rounds):
        path = paths[number % len(paths)]
        try:
            connection.request("GET", path)
            with connection.getresponse() as response:
                response.read()
        except BROKEN:
            broken[path] += 1
            connection.close()
        else:
            finished[f"{path} {response.status // 100}xx"] += 1
    connection.close()


def test_totals_are_what_the_clients_counted_though_a_worker_is_killed(
    mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    pulled = upstream.add("app", image(layers=1), tag="1")
    server = started(mirror, upstream, workers=2)
    ns = f"?ns={upstream.registry}"
    paths = {
        "manifest": f"/v2/app/manifests/1{ns}",
        "blob": f"/v2/app/blobs/{pulled.layers[0].digest}{ns}",
        "none": f"/v2/app/manifests/none{ns}",
        "other": "/v2/",
    }
    rounds = int(os.environ.get("ROUNDS", "1250"))
    finished = [Counter[str]() for _ in range(CLIENTS)]
    broken = [Counter[str]() for _ in range(CLIENTS)]
    clients = [
        threading.Thread(target=client, args=(server, [*paths.values()], rounds, a, b))
        for a, b in zip(finished, broken, strict=True)
    ]

    def workers() -> list[dict[str, int]]:
        found: list[dict[str, int]] = server.admin("/api/state").json()["workers"]
        return found

    server.wait_for(lambda: len(workers()) == 2, "both workers up")
    for each in clients:
        each.start()
    server.wait_for(
        lambda: sum(each.total() for each in finished) > CLIENTS * rounds // 3, "a third", LIMIT
    )
    os.kill(workers()[0]["pid"], signal.SIGKILL)
    for each in clients:
        each.join()
    server.wait_for_log("worker died")
    whole, cut = sum(finished, Counter[str]()), sum(broken, Counter[str]())
    assert whole.total() + cut.total() == CLIENTS * rounds
    assert cut.total() <= CLIENTS

    def counted(kind: str, status: str) -> float:
        return sum(
            value
            for name, value in server.metrics().items()
            if name.startswith("ociproxy_requests_total{")
            and f'kind="{kind}"' in name
            and f'status="{status}"' in name
        )

    for name, status in (("manifest", "2xx"), ("blob", "2xx"), ("none", "4xx"), ("other", "2xx")):
        kind = "manifest" if name == "none" else name
        least = whole[f"{paths[name]} {status}"]
        # Of a request that broke the client cannot know how far it came.
        assert least <= counted(kind, status) <= least + cut[paths[name]]
    assert server.metrics()["ociproxy_workers_died_total"] == 1


def test_a_pull_is_seen_in_every_number(
    mirror: Callable[..., Mirror], make_upstream: Callable[..., FakeUpstream]
) -> None:
    upstream, away = make_upstream(), make_upstream()
    pulled = upstream.add("app", image(layers=1, layer_size=100_000), tag="1")
    (layer,) = pulled.layers
    late = away.add("late", image("late"), tag="1")
    config = {
        "upstreams": [upstream_entry(upstream.url), upstream_entry(away.url)],
        "tags": [{"match": "*/late:*", "ttl": "0"}],
    }
    server = mirror(config, admin=True)
    held = http.client.HTTPConnection(server.host, server.port)
    with closing(held):
        held.request("GET", "/v2/")
        held.getresponse().read()
        for _ in range(3):
            assert server.manifest(upstream.registry, "app", "1").status == 200
            assert server.blob(upstream.registry, "app", layer.digest).body == layer.data
        assert server.manifest(away.registry, "late", "1").status == 200
        away.stop_listening()
        assert server.manifest(away.registry, "late", "1").status == 200
        assert server.manifest("127.0.0.9:1", "made-up", "1").status == 403
        server.wait_for(lambda: server.metrics()["ociproxy_connections"] >= 1, "connections seen")
        server.wait_for(
            lambda: (
                server.metrics().get(f'ociproxy_upstream_available{{registry="{away.registry}"}}')
                == 0
            ),
            "the upstream seen away",
        )
    seen = server.metrics()
    one, other = f'registry="{upstream.registry}"', 'registry="other"'
    assert seen['ociproxy_requests_total{kind="manifest",outcome="hit",status="2xx"}'] == 2
    assert seen['ociproxy_requests_total{kind="manifest",outcome="error",status="4xx"}'] == 1
    assert seen['ociproxy_requests_total{kind="other",outcome="hit",status="2xx"}'] == 1
    sent = [v for k, v in seen.items() if k.startswith('ociproxy_response_bytes_total{kind="blob"')]
    assert sum(sent) == 3 * layer.size
    assert seen['ociproxy_request_seconds_count{kind="blob"}'] == 3
    assert seen['ociproxy_first_byte_seconds_bucket{le="+Inf",outcome="hit"}'] >= 3
    assert seen['ociproxy_stale_answers_total{reason="upstream-unavailable"}'] == 1
    assert seen[f'ociproxy_upstream_requests_total{{{one},status="2xx"}}'] == 3
    blobs = sum(each.size for each in pulled.blobs)
    assert seen[f"ociproxy_upstream_bytes_total{{{one}}}"] == blobs + pulled.top.size
    assert seen[f'ociproxy_upstream_requests_total{{{other},status="error"}}'] >= 1
    assert seen["ociproxy_fills_total"] >= 2
    assert seen['ociproxy_stored_objects_total{kind="manifest"}'] == 2
    assert seen["ociproxy_disk_free_bytes"] > 0
    assert not any("127.0.0.9" in name for name in seen)
    manifests = 'ociproxy_store_objects{kind="manifest"}'
    server.wait_for(lambda: server.metrics().get(manifests) == 2, "the store surveyed", limit=60)
    surveyed = server.metrics()
    # Those of the other image may have come before its upstream went away.
    more = sum(each.size for each in late.blobs)
    assert blobs <= surveyed['ociproxy_store_bytes{kind="blob"}'] <= blobs + more
    new = upstream.add("app", image("new"))
    assert server.manifest(upstream.registry, "app", new.top.digest).status == 200
    server.wait_for(lambda: server.metrics()[manifests] == 3, "a new one counted")

    answer = server.admin("/metrics", {"Accept": OPENMETRICS})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    parsed = text_string_to_metric_families(answer.body.decode())  # type: ignore[no-untyped-call] # has none
    families = {each.name for each in parsed}
    declared = {each.name for each in (*COUNTERS, *HISTOGRAMS, *GAUGES)}
    # There is no limit, and no scrub has come to its end.
    absent = {"ociproxy_store_limit_bytes", ENDED}
    assert declared - families == absent
    assert families <= declared | {"ociproxy_build"}


def test_what_children_ask_of_upstreams_is_counted_also_of_a_killed_one(
    mirror: Callable[..., Mirror], upstream: FakeUpstream, tmp_path: Path
) -> None:
    """A sync, a load that is killed, and a load."""
    small = upstream.add("small", image("small"), tag="1")
    large = upstream.add("large", image("large", layers=1, layer_size=400_000), tag="1")
    blob = f"/blobs/{large.layers[0].digest}"
    upstream.fault(blob, Fault(stall_after=100_000))
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(f"{upstream.registry}/small:1\n")
    config = {
        "upstreams": [upstream_entry(upstream.url)],
        "sync": [{"images": str(wanted), "every": "1h"}],
    }
    server = mirror(config, args=["--workers", "2"], admin=True)
    server.wait_for_log("sync ended", LIMIT)
    body = f'["{upstream.registry}/large:1"]'
    headers = {"Content-Type": "application/json"}
    held = [http.client.HTTPConnection(server.host, server.admin_port) for _ in range(2)]

    def fetched() -> float:
        name = f'ociproxy_upstream_bytes_total{{registry="{upstream.registry}"}}'
        return server.metrics().get(name, 0)

    with closing(held[0]), closing(held[1]):
        before = fetched()
        assert before == small.top.size + sum(each.size for each in small.blobs)
        held[0].request("POST", "/api/load", body, headers)
        head = large.top.size + large.blobs[0].size
        server.wait_for(lambda: fetched() == before + head + 100_000, "the part", LIMIT)
        assert server.process is not None
        (load,) = children(server.process.pid, "load")
        os.kill(load, signal.SIGKILL)
        held[0].getresponse().read()
        assert fetched() == before + head + 100_000
        upstream.heal()
        asked = len(upstream.requests)
        held[1].request("POST", "/api/load", body, headers)
        assert b'"exitCode": 0' in held[1].getresponse().read()
    rest = upstream.requests[asked:]
    assert fetched() == before + head + 100_000 + sum(each.sent for each in rest)
    requests = 'ociproxy_upstream_requests_total{registry="'
    counted = [value for name, value in server.metrics().items() if name.startswith(requests)]
    assert sum(counted) == len(upstream.requests)


def children(parent: int, command: str) -> list[int]:
    """The processes below this one that run a command of the program."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            found += children(int(pid), command)
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"ociproxy.cli.child" in words and command.encode() in words:
                found.append(int(pid))
    return found


def test_a_failed_download_is_counted_with_its_reason(
    mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("app", image().layers[0])
    upstream.fault("/blobs/", Fault(flip_at=10))
    server = started(mirror, upstream)
    with suppress(http.client.IncompleteRead):
        server.blob(upstream.registry, "app", blob.digest)
    server.wait_for(
        lambda: server.metrics().get('ociproxy_fills_failed_total{reason="DigestMismatch"}', 0) > 1,
        "both tries counted",
    )
    assert server.metrics()['ociproxy_responses_cut_total{by="mirror"}'] == 1


def test_names_that_clients_make_up_make_no_series(
    mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    server = started(mirror, upstream)
    names = int(os.environ.get("NAMES", "100"))
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    with closing(connection):
        for number in range(names):
            registry = f"127.0.{number // 250}.{number % 250 + 1}:1"
            connection.request("GET", f"/v2/made/up/manifests/1?ns={registry}")
            with connection.getresponse() as response:
                assert response.status == 403
                response.read()
    seen = server.metrics()
    assert seen['ociproxy_upstream_requests_total{registry="other",status="error"}'] >= names
    assert len(seen) < 500


def test_a_scrape_of_many_series_is_quick(tmp_path: Path) -> None:
    """As many as there can be: every kind with every outcome and status, of 50 registries."""
    tally, store = share(2), Store(tmp_path)
    kinds = ("manifest", "blob", "tags", "referrers", "other")
    for outcome in ("hit", "fill", "follow", "stale", "miss", "error", "abandoned"):
        for kind in kinds:
            for status in ("2xx", "3xx", "4xx", "5xx"):
                tally.add(("ociproxy_requests", kind, outcome, status), 1)
            tally.add(("ociproxy_response_bytes", kind, outcome), 1)
        tally.observe(("ociproxy_first_byte_seconds", outcome), 1, 13, 0.1)
    for registry in range(50):
        for status in ("2xx", "3xx", "4xx", "429", "5xx", "error"):
            tally.add(("ociproxy_upstream_requests", f"registry-{registry}", status), 1)
    text, _ = expose(tally, of_disk(Config(), store), None, "")
    began = time.process_time()
    for _ in range(5):
        expose(tally, of_disk(Config(), store), None, "")
    assert (time.process_time() - began) / 5 < 0.1
    assert len(text.splitlines()) > 600


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, {READ: 0}),
        (Pass(1.0, position_at(0.25), saved=2.0), {READ: 0.25}),
        (Pass(5.0, position_at(0.5), saved=6.0, finished=4.0), {READ: 0.5, ENDED: 4}),
        (Pass(5.0, position_at(1.0), saved=9.0, finished=4.0), {READ: 1, ENDED: 9}),
    ],
)
def test_how_far_the_scrub_is_and_when_it_last_ended(
    tmp_path: Path, found: Pass | None, told: dict[str, float]
) -> None:
    store = Store(tmp_path / "store")
    if found is not None:
        PassFile(store, SCRUB).write(found)
    families = {each.name: each.samples[0].value for each in of_disk(Config(), store)}
    assert {name: value for name, value in families.items() if "scrub" in name} == told
