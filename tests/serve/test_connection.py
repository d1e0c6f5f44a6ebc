"""What `serve` needs of aiohttp beyond its documentation: a release may change any of it.

How large and how slow a request may be is tried from outside, in test_limits.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from ociproxy.config.local_settings import Serve
from ociproxy.serve.connection import Connection, ConnectionServer
from tests.serve.wire import statuses

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def said_to(handler: Handler, *pieces: bytes, limits: Serve | None = None) -> bytes:
    """All that a client is told that sends these pieces, up to the end of its connection."""
    made = ConnectionServer(handler, limits or Serve())
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        said = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
        await made.shutdown(1)
        await asyncio.sleep(0)
    return said


async def test_a_bug_before_the_response_is_a_500_of_this_api() -> None:
    """`handle_error` is called, and its response ends the connection."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        raise TimeoutError

    head, _, body = (await said_to(handler, REQUEST * 2)).partition(b"\r\n\r\n")
    assert statuses(head) == [500]
    assert b"connection: close" in head.lower()
    assert json.loads(body)["errors"][0]["code"] == "UNKNOWN"


async def test_a_bug_inside_the_response_cuts_it_short() -> None:
    """`writer.output_size` says that the head is out; ConnectionError ends the connection."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "10"})
        await response.prepare(request)
        await response.write(b"half")
        raise TimeoutError

    said = await said_to(handler, REQUEST * 2)
    assert statuses(said) == [200]
    assert said.endswith(b"\r\n\r\nhalf")


async def test_a_client_that_leaves_while_its_error_is_sent_is_no_bug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first bytes of the response find no client: then the socket cannot even be shut down."""
    ended = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        client.close()
        ended.set()
        raise TimeoutError

    made = ConnectionServer(handler, Serve())
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    async with server:
        client = socket.create_connection(server.sockets[0].getsockname())
        client.sendall(REQUEST)
        await asyncio.wait_for(ended.wait(), 10)
        await made.shutdown(1)
    assert caplog.records == []


async def test_requests_are_counted_as_they_are_parsed() -> None:
    """`_request_count`, on which the size of a head and idleness rest; `protocol` is ours."""
    counted: list[int] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        counted.append(connection._request_count)
        response = web.Response()
        if len(counted) == 3:
            response.force_close()
        return response

    assert statuses(await said_to(handler, REQUEST * 3 + b"GET /half")) == [200, 200, 200]
    assert counted == [3, 3, 3]


@pytest.mark.parametrize("behind", [b"", b"A: " + b"a" * 5000], ids=["nothing", "too much"])
async def test_what_is_behind_a_running_request_waits(behind: bytes) -> None:
    """Reading pauses above the size of a head, and goes on when the response is written."""
    running = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.2, running.set)
        await running.wait()
        return web.Response(body=b"answer")

    limits = Serve(head_limit=4096, head_timeout=1.0)
    said = await said_to(handler, REQUEST, b"GET / HTTP/1.1\r\n" + behind, limits=limits)
    assert statuses(said)[0] == 200
    assert b"\r\n\r\nanswerHTTP/1.1 4" in said


async def test_requests_behind_a_running_one_are_not_read_ahead() -> None:
    """A client that reads nothing would have so many heads in memory, each of the largest size."""
    counted: list[int] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        if not counted:
            await asyncio.sleep(1)
        counted.append(connection._request_count)
        response = web.Response()
        if len(counted) == 8:
            response.force_close()
        return response

    assert statuses(await said_to(handler, *[REQUEST] * 8)) == [200] * 8
    assert counted[0] <= 3


async def test_the_clock_of_a_head_is_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces of a head come behind a running request, and however long it runs."""
    loop = asyncio.get_running_loop()
    started: list[float] = []
    call_later = loop.call_later

    def counted(delay: float, callback: Callable[..., object], *args: object) -> object:
        if getattr(callback, "__name__", "") == "_head_overdue":
            started.append(delay)
        return call_later(delay, callback, *args)

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(1.5)
        return web.Response()

    monkeypatch.setattr(loop, "call_later", counted)
    pieces = [b"A: a\r\n"] * 10
    await said_to(handler, REQUEST, b"GET / HTTP/1.1\r\n", *pieces, limits=Serve(head_timeout=0.1))
    # One for each period of 0.1 s; with a timer more for each piece there would be hundreds.
    assert 2 <= len(started) <= 40
