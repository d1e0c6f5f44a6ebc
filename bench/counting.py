"""What counting for the metrics takes of a warm manifest: a server that is told to count nothing,
and to count again, in turn.

In many short rounds of one process: what the machine does beside hits both alike, and all objects
are at the same places in memory. Neighbours of a processor make a request dearer by a third, so
those rounds are compared that were disturbed the least. The processor time is read from the
scheduler, to the nanosecond.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import sys
from pathlib import Path

from bench.many import Many, make_store
from bench.processes import PROC, BenchError, ServerProcess, free_port, spawn
from bench.results import Plan, Results
from bench.scale import MANIFEST, get
from bench.servers import OCIPROXY, ociproxy_command

REQUESTS = 100
"""Of a round: some 20 ms of a processor."""
UNDISTURBED = 10
"""One round in so many."""
STARTS = 3
"""Of the server, which share the rounds: one may be placed unluckily."""
COUNTED = re.compile(rb'ociproxy_requests_total\{kind="manifest",[^}]*\} ([0-9.]+)')


class Server:
    def __init__(self, process: ServerProcess, admin: int) -> None:
        self._process = process
        self._connection = http.client.HTTPConnection("127.0.0.1", process.port)
        self._admin = admin

    def round(self, *, counts: bool) -> float:
        """Processor seconds of a request."""
        os.kill(self._process.popen.pid, signal.SIGUSR2 if counts else signal.SIGUSR1)
        get(self._connection, MANIFEST)
        before = self._spent()
        for _ in range(REQUESTS):
            get(self._connection, MANIFEST)
        return (self._spent() - before) / REQUESTS

    def counted(self) -> float:
        """Manifests, by the metrics."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._admin)) as admin:
            admin.request("GET", "/metrics")
            return sum(map(float, COUNTED.findall(admin.getresponse().read())))

    def _spent(self) -> float:
        """Of its event loop's thread, which answers warm manifests alone."""
        pid = self._process.popen.pid
        return int((PROC / f"{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def counting(work: Path, plan: Plan, results: Results) -> None:
    folder = work / "counting"
    folder.mkdir()
    (folder / "config.yaml").write_text("store: {scrub: never}\n")
    make_store(folder / "store", Many(100, 20))
    pairs: list[tuple[float, float]] = []
    try:
        for _ in range(STARTS):
            with contextlib.ExitStack() as stack:
                pairs += compare(start(stack, folder), plan.counting_rounds // STARTS)
    except (BenchError, OSError, http.client.HTTPException) as error:
        results.note(f"counting: {error}")
        return
    counted = undisturbed([one for one, _ in pairs])
    uncounted = undisturbed([other for _, other in pairs])
    results.put("counted", OCIPROXY, counted * 1e6)
    results.put("uncounted", OCIPROXY, uncounted * 1e6)
    results.put("counting", OCIPROXY, (counted / uncounted - 1) * 100)


def undisturbed(rounds: list[float]) -> float:
    return sorted(rounds)[len(rounds) // UNDISTURBED]


def start(stack: contextlib.ExitStack, folder: Path) -> Server:
    port, admin = free_port(), free_port()
    command = [*ociproxy_command(folder, port), "--offline", "--admin-port", str(admin)]
    command[:3] = [sys.executable, "-m", "bench.uncounted"]
    process = spawn("bench.uncounted", command, port, folder / "log")
    stack.callback(process.stop)
    process.wait_ready()
    return Server(process, admin)


def compare(server: Server, rounds: int) -> list[tuple[float, float]]:
    """For each pair of rounds what a request takes with and without counting."""
    pairs = []
    server.round(counts=True)
    before = server.counted()
    for number in range(rounds):
        # The one that comes first in a pair is not always the same.
        if number % 2:
            one, other = server.round(counts=True), server.round(counts=False)
        else:
            other, one = server.round(counts=False), server.round(counts=True)
        pairs.append((one, other))
    counted = server.counted() - before
    if counted != rounds * (REQUESTS + 1):
        raise BenchError(f"{counted:.0f} requests were counted, of {rounds} rounds")
    return pairs
