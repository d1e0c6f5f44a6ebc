"""A large store: how long commands take that walk all of it, and what a server beside them feels.

Of ociproxy only. Times are of the wall and of the processor; the server is asked for manifests all
the while, one after another, and now and then for its metrics. The last of these walks is the one
that the server begins itself, for its page.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.many import Many, make_store
from bench.processes import BenchError, ServerProcess, free_port, spawn
from bench.results import Plan, Results
from bench.servers import OCIPROXY, ociproxy_command

COMMANDS = {
    "list": ("list",),
    "check": ("check", "--quick"),
    "prune": ("prune", "--to-size", "1M", "--dry-run"),
}
"""The plan of a prune is what an eviction walks the store for."""
IDLE_SECONDS = 5.0
PAUSE = 0.002
"""Seconds between two requests: the client must not take a processor for itself."""
SCRAPE_EVERY = 0.2
PAGE_LIMIT = 300.0
MANIFEST = "/v2/team-0/app-0/manifests/1.0?ns=docker.io"


@dataclass
class Clients:
    """A client that pulls manifests and one that reads metrics, and what they felt."""

    main: http.client.HTTPConnection
    admin: http.client.HTTPConnection
    server: ServerProcess
    waits: list[float] = field(default_factory=list)
    scrapes: list[float] = field(default_factory=list)
    most: float = 0.0
    """MB of memory that the server took at most, without its child processes."""
    scraped: float = 0.0

    def ask(self) -> None:
        """For a manifest that the server has in memory; if it is time, for the metrics, too."""
        time.sleep(PAUSE)
        self.waits.append(get(self.main, MANIFEST))
        if time.perf_counter() - self.scraped > SCRAPE_EVERY:
            self.scrapes.append(get(self.admin, "/metrics"))
            self.scraped = time.perf_counter()
            self.most = max(self.most, self.server.own_rss())

    def p99(self) -> float:
        """Milliseconds."""
        return statistics.quantiles(self.waits, n=100)[98] * 1000


def scale(work: Path, plan: Plan, results: Results) -> None:
    folder = work / "scale"
    folder.mkdir()
    (folder / "config.yaml").write_text("store: {scrub: never}\n")
    make_store(folder / "store", Many(plan.scale_manifests, plan.scale_manifests // 5))
    os.sync()
    port, admin = free_port(), free_port()
    command = [*ociproxy_command(folder, port), "--offline", "--admin-port", str(admin)]
    server = spawn(OCIPROXY, command, port, folder / "log")
    try:
        server.wait_ready()
        with (
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as main,
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", admin)) as other,
        ):
            measure(main, other, server, folder / "store", results)
    except (BenchError, OSError, http.client.HTTPException) as error:
        results.note(f"scale: {error}")
    finally:
        server.stop()


def measure(
    main: http.client.HTTPConnection,
    admin: http.client.HTTPConnection,
    server: ServerProcess,
    store: Path,
    results: Results,
) -> None:
    idle = Clients(main, admin, server)
    end = time.perf_counter() + IDLE_SECONDS
    while time.perf_counter() < end:
        idle.ask()
    results.put("scale_idle_p99", OCIPROXY, idle.p99())
    results.put("scale_scrape_idle", OCIPROXY, statistics.median(idle.scrapes) * 1000)
    results.put("scale_scrape_idle_worst", OCIPROXY, max(idle.scrapes) * 1000)
    beside = []
    for name, words in COMMANDS.items():
        clients = Clients(main, admin, server)
        began = time.perf_counter()
        command = [sys.executable, "-m", "ociproxy", *words, "--image-path", str(store)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as child:
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                clients.ask()
            _, _, usage = os.wait4(child.pid, 0)
            child.returncode = 0
        results.put(f"scale_{name}", OCIPROXY, time.perf_counter() - began)
        results.put(f"scale_{name}_cpu", OCIPROXY, usage.ru_utime + usage.ru_stime)
        beside.append(clients)
    clients = Clients(main, admin, server)
    look_at_the_page(clients, results)
    results.put("scale_page_rss", OCIPROXY, max(clients.most, server.own_rss()) - idle.most)
    beside.append(clients)
    scrapes = [each for clients in beside for each in clients.scrapes]
    results.put("scale_p99", OCIPROXY, max(clients.p99() for clients in beside))
    results.put("scale_rss", OCIPROXY, max(each.most for each in beside[:-1]) - idle.most)
    results.put("scale_scrape", OCIPROXY, statistics.median(scrapes) * 1000)
    results.put("scale_scrape_worst", OCIPROXY, max(scrapes) * 1000)


def look_at_the_page(clients: Clients, results: Results) -> None:
    """Until it lists the images."""
    began, waits, shown = time.perf_counter(), [], b""
    while b"<tbody>" not in shown:
        if time.perf_counter() - began > PAGE_LIMIT:
            raise BenchError(f"the page lists no image after {PAGE_LIMIT:.0f} s")
        asked = time.perf_counter()
        clients.admin.request("GET", "/contents")
        shown = clients.admin.getresponse().read()
        waits.append(time.perf_counter() - asked)
        for _ in range(100):
            clients.ask()
    results.put("scale_page", OCIPROXY, time.perf_counter() - began)
    results.put("scale_page_worst", OCIPROXY, max(waits) * 1000)


def get(connection: http.client.HTTPConnection, path: str) -> float:
    """Seconds until all of it is there."""
    began = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise BenchError(f"{path} is answered with {response.status}")
    return time.perf_counter() - began
