"""A large store: how long commands take that walk all of it, and what a server beside them feels.

Of ociproxy only. Times are of the wall and of the processor; the server is asked for manifests all
the while, one after another.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import time
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


def scale(work: Path, plan: Plan, results: Results) -> None:
    folder = work / "scale"
    folder.mkdir()
    (folder / "config.yaml").write_text("store: {scrub: never}\n")
    make_store(folder / "store", Many(plan.scale_manifests, plan.scale_manifests // 5))
    os.sync()
    port = free_port()
    server = spawn(OCIPROXY, [*ociproxy_command(folder, port), "--offline"], port, folder / "log")
    try:
        server.wait_ready()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            measure(connection, server, folder / "store", results)
    except (BenchError, OSError) as error:
        results.note(f"scale: {error}")
    finally:
        server.stop()


def measure(
    connection: http.client.HTTPConnection, server: ServerProcess, store: Path, results: Results
) -> None:
    waits, end = [], time.perf_counter() + IDLE_SECONDS
    while time.perf_counter() < end:
        waits.append(ask(connection))
    results.put("scale_idle_p99", OCIPROXY, p99(waits))
    idle = server.rss()
    worst, most = 0.0, 0.0
    for name, words in COMMANDS.items():
        began, waits = time.perf_counter(), []
        command = [sys.executable, "-m", "ociproxy", *words, "--image-path", str(store)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as child:
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                waits.append(ask(connection))
                most = max(most, server.rss()) if len(waits) % 100 == 0 else most
            _, _, usage = os.wait4(child.pid, 0)
            child.returncode = 0
        results.put(f"scale_{name}", OCIPROXY, time.perf_counter() - began)
        results.put(f"scale_{name}_cpu", OCIPROXY, usage.ru_utime + usage.ru_stime)
        worst = max(worst, p99(waits))
    results.put("scale_p99", OCIPROXY, worst)
    results.put("scale_rss", OCIPROXY, most - idle)


def ask(connection: http.client.HTTPConnection) -> float:
    """Seconds until a manifest is there that the server has in memory."""
    time.sleep(PAUSE)
    began = time.perf_counter()
    connection.request("GET", "/v2/team-0/app-0/manifests/1.0?ns=docker.io")
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise BenchError(f"a manifest is answered with {response.status}")
    return time.perf_counter() - began


def p99(waits: list[float]) -> float:
    """Milliseconds."""
    return statistics.quantiles(waits, n=100)[98] * 1000
