"""One client connection: how large a request's head may be, and how long it may take.

The head is the request line and the headers. aiohttp bounds each line; their sum, and a client that
sends a byte at a time, are bounded here. A request's body is bounded by the handler that reads
it. What no handler reads aiohttp drops for a moment after the answer; then the connection ends.

Tests: tests/serve/test_connection.py, tests/serve/test_limits.py, tests/serve/test_smuggling.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.serve.errors import RequestInvalid, error_response, internal_error, last_words

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ociproxy.config.local_settings import Serve
    from ociproxy.errors import OciProxyError

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_BODY_TIME: Final = 1.0
"""Seconds for which the body of an answered request is dropped, so that the client reads the
answer before the connection ends."""
_LEAVE_TIME: Final = 5.0
"""Seconds that a client has to read what it was sent, once its connection is of no more use."""
_WRITE_BUFFER: Final = 64 * 1024
"""Bytes that wait for one client in memory: asyncio's TLS alone would hold half a megabyte."""
_SLICE: Final = 16 * 1024
"""Bytes that are parsed at once of a piece larger than a head may be: a too large head is noticed
before aiohttp has parsed all of it."""
_GREEDY: Final = 4
"""A client with more than this part of the connections loses for others what it uses, too."""
_HELLO: Final = b"\x16\x03"
"""A TLS handshake begins so, and no HTTP request does."""
_KNOWN: Final = 1024
"""Clients that the log has named for speaking HTTPS to a port of plain HTTP, or the reverse."""


class Connection(web.RequestHandler):
    """aiohttp's protocol, with the limits it lacks and errors in the shape of this API.

    The connection is idle while as many requests are answered as were parsed.
    """

    __slots__ = (
        "_answered",
        "_deadline",
        "_leaving",
        "_limits",
        "_paused_here",
        "_said_hello",
        "_server",
        "_unparsed",
        "arriving",
        "host",
        "left",
    )

    def __init__(self, server: ConnectionServer, serve: Serve, host: str) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type] # as web.Server has it for no access log
            max_line_size=serve.line_limit,
            max_field_size=serve.header_limit,
            max_headers=serve.headers,
            keepalive_timeout=serve.keepalive,
            lingering_time=_BODY_TIME,
            auto_decompress=False,  # a body is used as it comes, if at all
        )
        self._server = server
        self._limits = serve
        self._answered = 0
        self._unparsed = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._paused_here = False
        self._leaving = False
        self._said_hello = False
        self.host = host
        self.arriving: asyncio.Task[None] | None = None  # establishes it: the TLS handshake
        self.left = asyncio.Event()
        """Set when the connection is lost."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is not None and self.transport.get_extra_info("sslcontext") is not None:
            self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._start_clock()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_clock()
        self._server.forget(self)
        super().connection_lost(exc)
        self.left.set()

    def data_received(self, data: bytes) -> None:
        if len(data) <= self._limits.head_limit:
            self._feed(data)
            return
        for start in range(0, len(data), _SLICE):
            self._feed(data[start : start + _SLICE])

    def close(self) -> None:
        """End after the response that is running. aiohttp alone leaves an idle connection open."""
        super().close()
        if self.is_free and self.transport is not None:
            self.transport.close()

    def end_now(self) -> None:
        """Whatever it does, and whether the client reads what it was sent or not."""
        if self.transport is not None:
            self.transport.abort()
        elif self.arriving is not None:
            self.arriving.cancel()
        self._server.forget(self)

    def answered(self) -> None:
        """Called by the server when a handler has returned."""
        self._answered += 1
        if self._paused_here and self._is_idle and self.transport is not None:
            self._paused_here = False
            self.transport.resume_reading()

    @property
    def is_cut(self) -> bool:
        return self._server.cutting

    @property
    def is_free(self) -> bool:
        """Whether no request is being answered, and no answer is being sent."""
        return self._is_idle and not self._request_in_progress

    @property
    def _is_idle(self) -> bool:
        return self._answered == self._request_count

    def _feed(self, data: bytes) -> None:
        if self._leaving:
            return
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._said_hello = not heads and data.startswith(_HELLO)
            self._unparsed = 0
            self._stop_clock()
            if self._request_count - self._answered > 1:
                # The requests behind the running one have time: each may be as large as a head.
                self._pause()
        elif data and self.transport is not None:
            self._part_of_a_head(len(data))

    def _part_of_a_head(self, size: int) -> None:
        self._unparsed += size
        self._start_clock()
        if self._unparsed <= self._limits.head_limit or self.transport is None:
            return
        if self._is_idle:
            reason = f"a request line and headers of more than {self._limits.head_limit} bytes"
            self._refuse(RequestInvalid(reason, status=431))
        else:
            # This is the body of the request that is being answered, or the head of the next one:
            # there is enough of either. A handler that reads the body resumes with each read.
            self._pause()

    def _pause(self) -> None:
        """Read no more until what was parsed is answered."""
        if self.transport is not None:
            self._paused_here = True
            self.transport.pause_reading()

    def _start_clock(self) -> None:
        """No effect where it runs: a byte more buys no time."""
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._limits.head_timeout, self._head_overdue)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_overdue(self) -> None:
        self._deadline = None
        if not self._is_idle:
            # A request is being answered; the head behind it gets the same time once more.
            self._start_clock()
        elif self._unparsed:
            reason = f"no whole request within {self._limits.head_timeout:g} s"
            self._refuse(RequestInvalid(reason, status=408))
        else:
            self.force_close()

    def _refuse(self, error: OciProxyError) -> None:
        log.event(logging.INFO, "client refused", client=self._client(), reason=error)
        if self.transport is not None:
            self.transport.write(last_words(error))
        self.leave()

    def leave(self) -> None:
        """Let the client read all it was sent, drop what it sends, and end the connection when the
        client has left or its time is up.

        If the server closes a socket with unread input, the kernel drops what the client has not
        received, such as the end of a blob.
        """
        self._leaving = True
        self._stop_clock()
        if self.transport is not None:
            if self.transport.can_write_eof():
                with contextlib.suppress(OSError):  # the client has left just now
                    self.transport.write_eof()
            self.transport.resume_reading()
            asyncio.get_running_loop().call_later(_LEAVE_TIME, self.force_close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers where no handler could: bytes that are no request, or a bug."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun: it can only be cut short")
        if status != 400:
            if exc is not None:
                log.failure("request failed", exc)
            return _LastResponse(self, internal_error())
        level = logging.INFO
        if isinstance(exc, LineTooLong):
            error = RequestInvalid("a line or a header that is too long", status=431)
        elif self._said_hello:
            # skopeo, podman and docker begin so with each registry, and go on over plain HTTP.
            error = RequestInvalid("HTTPS on a port of plain HTTP", status=400)
            level = self._server.level_of_scheme(self._client() or "")
        else:
            error = RequestInvalid("not an HTTP/1.1 request", status=400)
        log.event(level, "client refused", client=self._client(), reason=error)
        return _LastResponse(self, error_response(error))

    def _client(self) -> str | None:
        address = self.transport and self.transport.get_extra_info("peername")
        return str(address[0]) if isinstance(address, tuple) else None


class _LastResponse(web.Response):
    """Ends its connection, when the client has had the time to read it."""

    def __init__(self, connection: Connection, response: web.Response) -> None:
        headers = {**response.headers, "Connection": "close"}
        super().__init__(status=response.status, body=response.body, headers=headers)
        self.force_close()
        self._connection = connection

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        self._connection.leave()
        await self._connection.left.wait()


def is_cut(request: web.BaseRequest) -> bool:
    """Of a request that was cancelled: whether the server ended it, and not the client."""
    return isinstance(request.protocol, Connection) and request.protocol.is_cut


class ConnectionServer(web.Server):
    """Makes connections and knows those that are open, from before their TLS handshake on."""

    def __init__(self, handler: Handler, serve: Serve) -> None:
        # A handler whose client has left is cancelled, whatever it waits for. Else it would keep
        # its files for as long as a fill stalls, and `serve.connections` would bound nothing.
        super().__init__(self._answer, handler_cancellation=True)
        self._handler = handler
        self.serve = serve
        """The limits of new connections."""
        self.cutting = False
        """Whether `cut` has been called."""
        self._known: BoundedCache[str, bool] = BoundedCache(_KNOWN)
        self._open: dict[Connection, None] = {}  # in the order in which they came
        self._of_host: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """What a cap on connections is compared with."""
        return len(self._open)

    def __call__(self, host: str = "") -> Connection:
        """`host` is the client's address."""
        connection = Connection(self, self.serve, host)
        self._open[connection] = None
        self._of_host[host] += 1
        return connection

    def end_one(self, newcomer: str | None = None) -> bool:
        """End a connection of the client that has the most: the oldest that is free, or else the
        oldest. For a newcomer only where that client has more than it would have, and one in use
        only of a greedy client. False where none is ended."""
        [(host, most)] = self._of_host.most_common(1) or [("", 0)]
        if newcomer is not None and most <= self._of_host[newcomer] + 1:
            return False
        made = [each for each in self._open if each.host == host]
        free = [each for each in made if each.is_free]
        if newcomer is not None and most * _GREEDY <= self.count:
            made = free
        for each in (*free, *made)[:1]:
            each.end_now()
        return bool(free or made)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._handler(request)
        if request.body_exists:
            # aiohttp drops the body and ends the connection, which so is never idle again.
            response.force_close()
        elif isinstance(request.protocol, Connection):
            request.protocol.answered()
        return response

    async def cut(self, seconds: float) -> None:
        """End the responses that are running. aiohttp waits twice for each, so many seconds."""
        self.cutting = True
        await self.shutdown(seconds)

    def level_of_scheme(self, client: str) -> int:
        """The level of the line about a client that speaks HTTPS to a port of plain HTTP, or the
        other way round: one line a client is enough, for some try it before each pull, and probes
        every few seconds."""
        if self._known.get(client):
            return logging.DEBUG
        self._known.put(client, True)
        return logging.INFO

    def forget(self, connection: Connection) -> None:
        """The connection has ended, or was never established."""
        if connection in self._open:
            del self._open[connection]
            self._of_host[connection.host] -= 1
            if not self._of_host[connection.host]:
                del self._of_host[connection.host]
