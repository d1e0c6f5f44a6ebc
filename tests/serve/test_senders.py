"""Blobs that are long enough for a thread of their own."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from ociproxy.serve.blob_response import BlobResponse
from ociproxy.serve.senders import Senders
from ociproxy.store.layers import BlobFile
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


async def test_what_waits_to_be_written_goes_first(tmp_path: Path, senders: Senders) -> None:
    """The end of one response is in the server's memory when the next one's file is sent."""
    blob, noise = random_blob(5 * MIB, seed=31), b"n" * MIB
    path = tmp_path / "blob"
    path.write_bytes(blob.data)
    file, written = io.FileIO(path), 0

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal written
        assert request.transport is not None
        while not request.transport.get_write_buffer_size():
            request.transport.write(noise)
            written += len(noise)
        source = BlobFile(file, blob.size, sealed=True)
        response = BlobResponse(source, {"Content-Length": str(blob.size)})
        response.force_close()
        await response.send(request, senders)
        return response

    loop = asyncio.get_running_loop()
    server = await loop.create_server(web.Server(handler), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        said = await reader.read()
        writer.close()
    assert said.count(b"n", 0, written) == written
    head, _, body = said[written:].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == blob.data


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
    cut = re.findall(rf"digest={blob.digest}.* bytes=(\d+)", server.log())
    assert cut.count(str(blob.size)) >= 3
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
