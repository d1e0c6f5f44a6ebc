"""A server process under measurement: start, wait until it answers, read /proc, end.

CPU and memory are those of the process and all its descendants, so a server with workers is
charged for them. Memory is in MB of 10^6 bytes.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
CHECKOUT = Path(__file__).resolve().parent.parent
READY_SECONDS = 15.0
STOP_SECONDS = 5.0


class BenchError(Exception):
    """A measurement that cannot be made; the message goes into the table's notes."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class ServerProcess:
    """Owns one process group; `stop` ends it whatever state it is in."""

    name: str
    port: int
    popen: subprocess.Popen[bytes]
    log: Path
    started: float
    first_answer: float = field(default=0.0)

    def wait_ready(self) -> None:
        """Poll `/v2/` until it answers 200; the wait itself is the cold start measurement."""
        deadline = self.started + READY_SECONDS
        while time.perf_counter() < deadline:
            if self.popen.poll() is not None:
                raise BenchError(f"{self.name} exited with {self.popen.returncode}: {self.tail()}")
            if self._answers():
                self.first_answer = time.perf_counter() - self.started
                return
            time.sleep(0.002)
        raise BenchError(f"{self.name} did not answer within {READY_SECONDS:.0f} s: {self.tail()}")

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/v2/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    def pids(self) -> list[int]:
        """This process and its descendants, from one look at every process's parent."""
        children: dict[int, list[int]] = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.popen.pid]
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids():
            if fields := _stat(pid):
                # utime, stime, and the same of children that were waited for
                ticks += sum(int(value) for value in fields[11:15])
        return ticks / TICKS

    def rss(self) -> float:
        return sum(_status_megabytes(pid, "VmRSS") for pid in self.pids())

    def own_rss(self) -> float:
        """Of the first process alone, without what it runs as children for a while."""
        return _status_megabytes(self.popen.pid, "VmRSS")

    def peak(self) -> float:
        return sum(_status_megabytes(pid, "VmHWM") for pid in self.pids())

    def reset_peak(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                (PROC / str(pid) / "clear_refs").write_text("5")

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            self.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The group, not the process: a worker may outlive the one that started it.
            self._signal(signal.SIGKILL)
            self.popen.wait(STOP_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


def environment() -> dict[str, str]:
    """Without settings for ociproxy; and its checkout may keep its byte code, as an installation
    has it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OCIPROXY_") and name != "PYTHONDONTWRITEBYTECODE"
    }


def spawn(name: str, argv: Sequence[str], port: int, log: Path) -> ServerProcess:
    """Start without waiting; output goes to `log`, the way a service's goes to a journal."""
    with log.open("ab") as output:
        started = time.perf_counter()
        popen = subprocess.Popen(
            argv,
            cwd=CHECKOUT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return ServerProcess(name=name, port=port, popen=popen, log=log, started=started)


def settle(*servers: ServerProcess, limit: float = 20.0) -> None:
    """Wait until nobody works any more: fills go on after the client has its last byte."""
    deadline = time.perf_counter() + limit
    before = sum(server.cpu_seconds() for server in servers)
    quiet = 0
    while quiet < 3 and time.perf_counter() < deadline:
        time.sleep(0.1)
        now = sum(server.cpu_seconds() for server in servers)
        quiet = quiet + 1 if now - before < 0.015 else 0
        before = now


def _stat(pid: int) -> list[str] | None:
    """Fields after the command name, which may itself hold spaces and brackets."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _status_megabytes(pid: int, key: str) -> float:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0.0
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
