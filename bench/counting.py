"""What counting for the metrics takes of a warm manifest: two servers over one store, of which one
counts nothing.

They are asked in turn, in many short rounds: what the machine does beside hits both alike. The
processor time is read from the scheduler, to the nanosecond.
"""

from __future__ import annotations

import contextlib
import http.client
import statistics
import sys
from pathlib import Path

from bench.many import Many, make_store
from bench.processes import PROC, BenchError, ServerProcess, free_port, spawn
from bench.results import Plan, Results
from bench.scale import MANIFEST, get
from bench.servers import OCIPROXY, ociproxy_command

REQUESTS = 1000
"""Of a round: half a second."""


def counting(work: Path, plan: Plan, results: Results) -> None:
    folder = work / "counting"
    folder.mkdir()
    (folder / "config.yaml").write_text("store: {scrub: never}\nserve: {admin: {port: 0}}\n")
    make_store(folder / "store", Many(100, 20))
    with contextlib.ExitStack() as stack:
        try:
            counted = start(stack, folder, "ociproxy")
            uncounted = start(stack, folder, "bench.uncounted")
            measure(counted, uncounted, plan, results)
        except (BenchError, OSError, http.client.HTTPException) as error:
            results.note(f"counting: {error}")


class Server:
    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self.connection = http.client.HTTPConnection("127.0.0.1", process.port)

    def round(self) -> float:
        """Processor seconds of a request."""
        before = self._spent()
        for _ in range(REQUESTS):
            get(self.connection, MANIFEST)
        return (self._spent() - before) / REQUESTS

    def _spent(self) -> float:
        """Of its event loop's thread, which answers warm manifests alone."""
        pid = self._process.popen.pid
        return int((PROC / f"{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def start(stack: contextlib.ExitStack, folder: Path, module: str) -> Server:
    port = free_port()
    command = [*ociproxy_command(folder, port), "--offline"]
    command[:3] = [sys.executable, "-m", module]
    process = spawn(module, command, port, folder / f"log-{module}")
    stack.callback(process.stop)
    process.wait_ready()
    return Server(process)


def measure(counted: Server, uncounted: Server, plan: Plan, results: Results) -> None:
    pairs = []
    for number in range(plan.counting_rounds + 2):
        # The one that comes first in a pair is not always the same.
        if number % 2:
            one, other = counted.round(), uncounted.round()
        else:
            other, one = uncounted.round(), counted.round()
        if number >= 2:
            pairs.append((one, other))
    results.put("counted", OCIPROXY, statistics.median(one for one, _ in pairs) * 1e6)
    results.put("uncounted", OCIPROXY, statistics.median(other for _, other in pairs) * 1e6)
    parts = [one / other - 1 for one, other in pairs]
    results.put("counting", OCIPROXY, statistics.median(parts) * 100)
