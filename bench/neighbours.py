"""A healthy upstream beside bad ones: how long its cold blobs take to begin.

One upstream hangs on 100 blobs and one crawls through 40, for clients that wait for them all the
time. Meanwhile blobs of a third one are asked for, one after another. The upstreams are in this
process. They are listed in the configuration; and then not, as without a configuration file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.clients import Request, download
from bench.processes import BenchError, free_port, spawn
from bench.results import Plan, Results
from bench.servers import OCIPROXY, ociproxy_command

HANGING, CRAWLING = 100, 40
BLOB = 1 << 20
CRAWL_RATE = 4096
LIMIT = 30.0
PAUSE = 0.2
BUSY_SECONDS = 2.0
"""From when the bad upstreams are asked until the healthy one is: by then all that can wait for
them does."""


class Neighbour:
    """A registry in a thread that hangs, crawls, or answers at once with `blobs`."""

    def __init__(self, address: str, *, rate: int | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked = threading.Event()
        self._rate = rate
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._socket = socket.create_server((address, 0), backlog=512)
        host, port = self._socket.getsockname()
        self.name = f"{host}:{port}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def add_blobs(self, count: int) -> list[str]:
        made = [os.urandom(BLOB) for _ in range(count)]
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in made}
        return list(self.blobs)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen())

    async def _listen(self) -> None:
        await asyncio.start_server(self._serve, sock=self._socket)
        await self._ended.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # A greeting of TLS has no such end, and its connection is closed: plain HTTP it is.
            while (await reader.readexactly(1)).isalpha():
                line = await reader.readline()
                await reader.readuntil(b"\r\n\r\n")
                await self._answer(line.split()[1].decode(), writer)
        writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        body = b"{}" if path == "/v2/" else self.blobs.get(path.rpartition(":")[2])
        if body is None:
            self.asked.set()
            await self._crawl(writer) if self._rate else await asyncio.sleep(3600)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async def _crawl(self, writer: asyncio.StreamWriter) -> None:
        assert self._rate is not None
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BLOB)
        for _ in range(BLOB // self._rate):
            writer.write(bytes(self._rate))
            await writer.drain()
            await asyncio.sleep(1)


def neighbours(work: Path, plan: Plan, results: Results) -> None:
    addresses = {"listed": "127.0.0.1", "unlisted": own_address()}
    for kind, address in addresses.items():
        try:
            if address is None:
                raise BenchError("unlisted upstreams need an address that is not loopback")
            seconds = _first_bytes(work, address, plan.neighbour_blobs, listed=kind == "listed")
        except BenchError as error:
            results.note(f"beside bad upstreams, {kind}: {error}")
            continue
        results.put(f"beside_{kind}", OCIPROXY, statistics.median(seconds) * 1000)
        results.put(f"beside_{kind}_worst", OCIPROXY, max(seconds) * 1000)


def own_address() -> str | None:
    """An address of this machine that is not loopback: a registry that is not listed may not be
    there. None where there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address
    return None


def _first_bytes(work: Path, address: str, count: int, *, listed: bool) -> list[float]:
    """Seconds until the first byte of each blob of the healthy upstream."""
    with contextlib.ExitStack() as stack:
        hanging, crawling = Neighbour(address), Neighbour(address, rate=CRAWL_RATE)
        healthy = Neighbour(address)
        names = [each.name for each in (hanging, crawling, healthy)]
        for each in (hanging, crawling, healthy):
            stack.callback(each.close)
        port = stack.enter_context(_server(work, names if listed else []))
        wanted = [
            *(_request(port, hanging, f"{n:064x}") for n in range(HANGING)),
            # Other digests: upstreams that are listed share the download of a blob.
            *(_request(port, crawling, f"f{n:063x}") for n in range(CRAWLING)),
        ]
        stack.enter_context(_waiting(wanted))
        for each in (hanging, crawling):
            if not each.asked.wait(LIMIT):
                raise BenchError("a bad upstream was not asked")
        time.sleep(BUSY_SECONDS)
        seconds = []
        for blob in healthy.add_blobs(count):
            (done,) = download([_request(port, healthy, blob)], limit=LIMIT)
            seconds.append(done.first_byte)
            time.sleep(PAUSE)
        return seconds


@contextlib.contextmanager
def _server(work: Path, listed: list[str]) -> Iterator[int]:
    """The port of a server with an empty store that knows these upstreams."""
    entries = [{"name": name, "scheme": "http"} for name in listed]
    config = {"upstreams": entries, "fetch": {"unlisted": {"scheme": "auto"}}}
    with tempfile.TemporaryDirectory(prefix="beside-", dir=work) as name:
        directory, port = Path(name), free_port()
        (directory / "config.yaml").write_text(json.dumps(config))
        process = spawn(OCIPROXY, ociproxy_command(directory, port), port, directory / "log")
        try:
            process.wait_ready()
            yield port
        finally:
            process.stop()


def _request(port: int, neighbour: Neighbour, blob: str) -> Request:
    return Request(port, f"/v2/app/blobs/sha256:{blob}?ns={neighbour.name}")


@contextlib.contextmanager
def _waiting(requests: list[Request]) -> Iterator[None]:
    """Clients that wait for these blobs. What the slow ones bring fits in the sockets' buffers."""
    with contextlib.ExitStack() as stack:
        for request in requests:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", request.port)))
            client.sendall(f"GET {request.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        yield
