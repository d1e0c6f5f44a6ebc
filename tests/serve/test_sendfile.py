"""Blobs that are long enough for a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import io
import itertools
import re
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from ociproxy.errors import StoreError
from ociproxy.fetch.download.fill import Fill
from ociproxy.fetch.upstreams.threads import StoreThreads
from ociproxy.serve.blobs import BlobResponse
from ociproxy.serve.sendfile import Senders
from ociproxy.store.read_only import BlobFile
from tests.images import Content, random_blob
from tests.serve.scene import MIB, Scene
from tests.serve.wire import Wire


@pytest.fixture
def senders() -> Iterator[Senders]:
    with closing(Senders()) as made:
        yield made


def stored(scene: Scene, size: int) -> Content:
    blob = scene.blob(size)
    scene.get(blob)
    scene.server.wait_for_file(f"blobs/{blob.encoded}")
    return blob


async def no_relay(reason: StoreError) -> Fill:
    raise reason


class Responding:
    """Sends one blob over one connection, after as much noise as the sockets do not take."""

    def __init__(self, senders: Senders, source: BlobFile, *, noise: bool = False) -> None:
        self._senders = senders
        self._source = source
        self._noise = b"n" * MIB if noise else b""
        self.noise_sent = 0
        self.error: Exception | None = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        while self._noise and not request.transport.get_write_buffer_size():
            request.transport.write(self._noise)
            self.noise_sent += len(self._noise)
        headers = {"Content-Length": str(self._source.size)}
        response = BlobResponse(self._source, headers, no_relay, StoreThreads(1))
        response.force_close()
        try:
            await response.send(request, self._senders)
        except OSError as exc:
            self.error = exc
            raise ConnectionResetError from exc
        return response

    async def ask(self, *, half_close: bool = False) -> bytes:
        """All that a client is sent who begins to read late."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(web.Server(self._handle), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            said = await reader.read(1)
            if half_close:
                writer.write_eof()
            await asyncio.sleep(0.1)
            said += await reader.read()
            writer.close()
        return said


async def test_what_waits_to_be_written_goes_first(tmp_path: Path, senders: Senders) -> None:
    """The end of one response is in the server's memory when the next one's file is sent."""
    data = random_blob(5 * MIB, seed=31).data
    (tmp_path / "blob").write_bytes(data)
    source = BlobFile(io.FileIO(tmp_path / "blob"), len(data), sealed=True)
    responding = Responding(senders, source, noise=True)
    said = await responding.ask()
    assert said.count(b"n", 0, responding.noise_sent) == responding.noise_sent
    head, _, body = said[responding.noise_sent :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == data


async def test_a_client_may_close_while_something_waits(tmp_path: Path, senders: Senders) -> None:
    """Its socket is closed as soon as that is written."""
    (tmp_path / "blob").write_bytes(bytes(5 * MIB))
    source = BlobFile(io.FileIO(tmp_path / "blob"), 5 * MIB, sealed=True)
    responding = Responding(senders, source, noise=True)
    said = await responding.ask(half_close=True)
    assert said[: responding.noise_sent] == b"n" * responding.noise_sent
    assert isinstance(responding.error, ConnectionError)


@pytest.mark.parametrize("size", [MIB, 5 * MIB])
async def test_a_blob_inside_a_file(tmp_path: Path, senders: Senders, size: int) -> None:
    data = random_blob(size, seed=32).data
    (tmp_path / "bundle").write_bytes(b"before" + data + b"after")
    source = BlobFile(io.FileIO(tmp_path / "bundle"), size, sealed=True, offset=len(b"before"))
    assert (await Responding(senders, source).ask()).partition(b"\r\n\r\n")[2] == data


@pytest.mark.parametrize("size", [MIB, 5 * MIB])
async def test_a_file_that_has_no_sendfile(senders: Senders, size: int) -> None:
    """As on some file systems: that of processes, whose memory can only be read."""
    data = bytearray(random_blob(size, seed=33).data)
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(data))
    source = BlobFile(io.FileIO("/proc/self/mem"), size, sealed=True, offset=address)
    assert (await Responding(senders, source).ask()).partition(b"\r\n\r\n")[2] == data


def test_ranges_of_a_long_blob_by_many_at_once(scene: Scene) -> None:
    scene.start()
    blob = stored(scene, 24 * MIB)
    wanted = [(at * 99_991, at * 99_991 + 9 * MIB) for at in range(24)]

    def ask(part: tuple[int, int]) -> bytes:
        return scene.get(blob, {"Range": f"bytes={part[0]}-{part[1] - 1}"}).body

    with ThreadPoolExecutor(24) as pool:
        for part, body in zip(wanted, pool.map(ask, wanted), strict=True):
            assert body == blob.data[slice(*part)]


def test_clients_that_leave_keep_nothing_open(scene: Scene) -> None:
    server = scene.start()
    blob = stored(scene, 32 * MIB)
    assert server.process is not None
    files = Path(f"/proc/{server.process.pid}/fd")
    scene.get(blob)
    before = len(list(files.iterdir()))
    for _ in range(8):
        with scene.open(blob) as response:
            assert response.read(1) == blob.data[:1]
    server.wait_for(lambda: len(list(files.iterdir())) <= before)
    assert scene.get(blob).body == blob.data
    sizes = re.findall(rf"INFO  request .* digest={blob.digest} .* bytes=(\d+)", server.log())
    assert sizes.count(str(blob.size)) == 3
    assert len(sizes) == 3 + 8
    assert "Traceback" not in server.log()


def test_a_client_that_asks_and_reads_nothing_fills_no_memory(scene: Scene) -> None:
    scene.start()
    blob = stored(scene, 60_000)
    ask = f"GET {scene.path('blobs', blob.digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with Wire(scene.server, receive_buffer=4096) as client:
        client.send(ask * 10_000)
        time.sleep(1)
        assert scene.server.peak_rss() < 90_000_000


def open_in(store: Path, pid: int) -> list[Path]:
    """What a process has open in the store."""
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(file.readlink())
    return [path for path in found if path.is_relative_to(store)]


def test_what_cannot_be_sent_says_why_in_the_log(scene: Scene) -> None:
    server = scene.start()
    blob = stored(scene, 8 * MIB)
    assert server.process is not None
    pid = server.process.pid

    def open_files() -> set[int]:
        return {int(file.name) for file in Path(f"/proc/{pid}/fd").iterdir()}

    def is_settled() -> bool:
        before = open_files()
        time.sleep(0.2)
        return before == open_files() and not open_in(server.store / "pulls", pid)

    server.wait_for(is_settled, "done with what it does at its start")
    used = open_files()
    free = (number for number in itertools.count() if number not in used)
    # For the connection, the file, and one of the two that a thread needs.
    last = list(itertools.islice(free, 3))[-1]
    was = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (last + 1, was[1]))
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        scene.get(blob)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, was)
    server.wait_for_log('reason="too many open files"')
    assert scene.get(blob).body == blob.data
    assert "Traceback" not in server.log()


def test_clients_that_take_nothing_hold_up_nobody(scene: Scene) -> None:
    scene.start()
    blob = stored(scene, 24 * MIB)
    clients = [Wire(scene.server, receive_buffer=4096) for _ in range(40)]
    try:
        for client in clients:
            client.ask(scene.path("blobs", blob.digest))
        assert scene.get(blob).body == blob.data
    finally:
        for client in clients:
            client.socket.close()
