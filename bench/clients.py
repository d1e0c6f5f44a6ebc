"""Clients that cost less than the servers they measure.

A blob client throws the body away inside the kernel (`MSG_TRUNC` on a TCP socket copies nothing),
and one epoll loop drives all connections. Manifests are asked for by wrk.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.images import MANIFEST_TYPE
from bench.processes import BenchError
from bench.servers import find_wrk

CHUNK = 1 << 20
HEAD_LIMIT = 64 << 10
SLOW_TICK = 0.25
WRK_CONNECTIONS = 16


@dataclass(frozen=True)
class Request:
    port: int
    path: str


@dataclass(frozen=True)
class Download:
    """Seconds count from the connect; the first byte is the first of the body."""

    first_byte: float
    total: float
    received: int


class _Connection:
    """One GET on its own connection: connect, send, read the head, discard the body."""

    def __init__(self, request: Request, sink: bytearray) -> None:
        self._sink = sink
        self._out = (
            f"GET {request.path} HTTP/1.1\r\nHost: 127.0.0.1:{request.port}\r\n"
            "User-Agent: ociproxy-bench\r\nConnection: close\r\n\r\n"
        ).encode()
        self.path = request.path
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.started = time.perf_counter()
        self.first_byte: float | None = None
        self.ended: float | None = None
        self.length: int | None = None
        self.received = 0
        with contextlib.suppress(BlockingIOError):
            self.sock.connect(("127.0.0.1", request.port))

    def send(self) -> bool:
        """True when the whole request is out."""
        with contextlib.suppress(BlockingIOError):
            self._out = self._out[self.sock.send(self._out) :]
        return not self._out

    def receive(self, limit: int = CHUNK) -> int:
        """Discard up to `limit` bytes of the body; how many there were."""
        try:
            if self.length is None and not self._read_head():
                return 0
            count = self.sock.recv_into(self._sink, limit, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        now = time.perf_counter()
        if count == 0 and self.received != self.length:
            raise BenchError(f"{self.path}: cut short at {self.received} of {self.length} bytes")
        if self.first_byte is None:
            self.first_byte = now
        self.received += count
        if self.received == self.length:
            self.ended = now
        return count

    def _read_head(self) -> bool:
        seen = self.sock.recv(HEAD_LIMIT, socket.MSG_PEEK)
        end = seen.find(b"\r\n\r\n") + 4
        if end < 4:
            if not seen or len(seen) == HEAD_LIMIT:
                raise BenchError(f"{self.path}: no response")
            return False
        status, _, rest = self.sock.recv(end).partition(b"\r\n")
        headers = http.client.parse_headers(io.BytesIO(rest))
        if status.split()[1] != b"200" or "Content-Length" not in headers:
            raise BenchError(f"{self.path}: {status.decode('latin-1')}")
        self.length = int(headers["Content-Length"])
        return True

    def result(self) -> Download:
        if self.first_byte is None or self.ended is None:
            raise BenchError(f"{self.path}: not complete")
        return Download(self.first_byte - self.started, self.ended - self.started, self.received)


def download(requests: Sequence[Request], *, limit: float) -> list[Download]:
    """All requests at once, each read as fast as it comes; every body complete, or an error."""
    sink = bytearray(CHUNK)
    deadline = time.perf_counter() + limit
    connections: list[_Connection] = []
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
        for request in requests:
            connection = _Connection(request, sink)
            sockets.callback(connection.sock.close)
            connections.append(connection)
            selector.register(connection.sock, selectors.EVENT_WRITE, connection)
        waiting = len(connections)
        while waiting:
            if time.perf_counter() > deadline:
                raise BenchError(f"{requests[0].path}: not complete after {limit:.0f} s")
            try:
                for key, events in selector.select(timeout=1.0):
                    waiting -= _advance(selector, key.data, events)
            except OSError as error:
                raise BenchError(f"{requests[0].path}: {error}") from error
    return [connection.result() for connection in connections]


def _advance(selector: selectors.BaseSelector, connection: _Connection, events: int) -> int:
    """One step of one connection; 1 when it is done."""
    if events & selectors.EVENT_WRITE:
        if connection.send():
            selector.modify(connection.sock, selectors.EVENT_READ, connection)
    elif connection.receive() and connection.ended is not None:
        selector.unregister(connection.sock)
        connection.sock.close()
        return 1
    return 0


def trickle(requests: Sequence[Request], *, rate: int, seconds: float) -> int:
    """Read `rate` bytes/s on each connection for a while, then close; how many got any body."""
    sink = bytearray(CHUNK)
    with contextlib.ExitStack() as sockets:
        connections = []
        for request in requests:
            connection = _Connection(request, sink)
            sockets.callback(connection.sock.close)
            connections.append(connection)
        end = time.perf_counter() + seconds
        try:
            unsent = list(connections)
            while time.perf_counter() < end:
                tick = time.perf_counter() + SLOW_TICK
                unsent = [c for c in unsent if not c.send()]
                for connection in connections:
                    if connection.ended is None:
                        connection.receive(int(rate * SLOW_TICK))
                time.sleep(max(0.0, tick - time.perf_counter()))
        except OSError as error:
            raise BenchError(f"{requests[0].path}: {error}") from error
        return sum(connection.first_byte is not None for connection in connections)


def take_all(port: int, paths: Sequence[str], *, connections: int, limit: float) -> float:
    """Seconds until each path was answered with a whole 200, over so many kept connections."""
    waiting = iter(paths)
    sending: dict[socket.socket, bytes] = {}
    left = len(paths)

    def send(sock: socket.socket) -> None:
        path = next(waiting, None)
        sending[sock] = b""
        if path is not None:
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: {MANIFEST_TYPE}"
            sock.sendall(f"{head}\r\n\r\n".encode())

    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
        for _ in range(connections):
            sock = sockets.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ)
        began = time.perf_counter()
        for key in list(selector.get_map().values()):
            send(key.fileobj)  # type: ignore[arg-type] # it is the socket
        while left:
            if time.perf_counter() - began > limit:
                raise BenchError(f"{left} of {len(paths)} not answered after {limit:.0f} s")
            for key, _ in selector.select(timeout=1.0):
                sock = key.fileobj  # type: ignore[assignment] # it is the socket
                came = sock.recv(HEAD_LIMIT)
                sending[sock] += came
                head, blank, body = sending[sock].partition(b"\r\n\r\n")
                length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
                if not came or (blank and (not head.startswith(b"HTTP/1.1 200") or not length)):
                    raise BenchError(f"{head[:200]!r}")
                if length and len(body) >= int(length[1]):
                    left -= 1
                    send(sock)
        return time.perf_counter() - began


@dataclass(frozen=True)
class Rate:
    requests: int
    per_second: float


def wrk(request: Request, *, seconds: int) -> Rate:
    argv = [find_wrk(), "-t1", f"-c{WRK_CONNECTIONS}", f"-d{seconds}s"]
    argv += ["-H", f"Accept: {MANIFEST_TYPE}", f"http://127.0.0.1:{request.port}{request.path}"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds + 20, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"wrk {request.path}: no end after {seconds + 20} s") from error
    total = re.search(r"(\d+) requests in", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    bad = re.search(r"Non-2xx.*|Socket errors.*", done.stdout)
    if not total or not rate or bad:
        reason = bad[0] if bad else done.stderr.strip() or f"exit {done.returncode}"
        raise BenchError(f"wrk {request.path}: {reason}")
    return Rate(int(total[1]), float(rate[1]))
