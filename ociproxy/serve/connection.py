"""One client connection: how large a request's head may be and how long it may take.

The head is the request line and the headers. aiohttp bounds its lines one by one; what they come
to, and a client that sends them a byte at a time, are bounded here. A request's body is nobody's
business: it is read and dropped for a moment after the answer, then the connection ends.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from ociproxy import log
from ociproxy.serve.errors import RequestInvalid, error_response, internal_error, last_words

if TYPE_CHECKING:
    from ociproxy.config.local_settings import Serve
    from ociproxy.errors import OciProxyError

_BODY_TIME: Final = 1.0
"""Seconds for which the body of an answered request is dropped, so that the client reads that
answer before the connection ends."""
_LEAVE_TIME: Final = 5.0
"""Seconds that a client has for what it was sent, after its connection is of no more use."""
_WRITE_BUFFER: Final = 64 * 1024
"""Bytes that wait for one client in memory: asyncio's TLS alone would hold half a megabyte."""
_SLICE: Final = 16 * 1024


class HeadClock:
    """Which connections owe a whole request head, and until when."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        # In the order of their deadlines, since all have the same time.
        self._waiting: dict[Connection, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self, connection: Connection) -> None:
        """No effect where it runs already: a byte more buys no time."""
        if connection not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[connection] = loop.time() + self.timeout
            if self._timer is None:
                self._timer = loop.call_later(self.timeout, self._tick)

    def stop(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def _tick(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._waiting:
            connection, deadline = next(iter(self._waiting.items()))
            if deadline > loop.time():
                self._timer = loop.call_at(deadline, self._tick)
                return
            del self._waiting[connection]
            connection.head_overdue()


class Connection(web.RequestHandler):
    """aiohttp's protocol, with the limits it lacks and errors in the shape of ours."""

    __slots__ = ("_clock", "_clocked", "_head_limit", "_last", "_left", "_unparsed")

    def __init__(
        self, server: ConnectionServer, *, clock: HeadClock, head_limit: int, **limits: Any
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **limits)
        self._clock = clock
        self._clocked = False
        self._head_limit = head_limit
        self._unparsed = 0
        self._last: web.StreamResponse | None = None
        self._left: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.ssl_context is not None and self.transport is not None:
            self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._start_clock()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._clock.stop(self)
        super().connection_lost(exc)
        if self._left is not None and not self._left.done():
            self._left.set_result(None)

    def data_received(self, data: bytes) -> None:
        if len(data) <= self._head_limit:
            self._feed(data)
            return
        for start in range(0, len(data), _SLICE):
            self._feed(data[start : start + _SLICE])

    def _feed(self, data: bytes) -> None:
        if self._left is not None:
            return
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._unparsed = 0
            if self._clocked:
                self._clocked = False
                self._clock.stop(self)
        elif data and not self._force_close:
            self._part_of_a_head(len(data))

    def _part_of_a_head(self, size: int) -> None:
        self._unparsed += size
        self._start_clock()
        if self._unparsed <= self._head_limit:
            return
        if self._is_idle():
            reason = f"a request line and headers of more than {self._head_limit} bytes"
            self._refuse(RequestInvalid(reason, status=431))
        elif self.transport is not None:
            # While a request is being answered this is its body, or the next one's head: whichever,
            # enough of it.
            self._pause_transport_reading()

    def _is_idle(self) -> bool:
        """Whether there is no request that is being answered, or waits for that."""
        return self._waiter is not None and not self._waiter.done()

    def _start_clock(self) -> None:
        if not self._clocked:
            self._clocked = True
            self._clock.start(self)

    def head_overdue(self) -> None:
        """The clock's: time is up."""
        self._clocked = False
        if not self._is_idle():
            # A request is being answered; its successor has the time that is left after that.
            self._start_clock()
        elif self._unparsed:
            reason = f"no whole request within {self._clock.timeout:g} s"
            self._refuse(RequestInvalid(reason, status=408))
        else:
            self.force_close()

    def _refuse(self, error: OciProxyError) -> None:
        log.event(logging.INFO, "client refused", client=self._client(), reason=error)
        if self.transport is not None:
            self.transport.write(last_words(error))
        self._leave()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if resp is self._last and self.transport is not None:
            self._leave()
            if self._left is not None:
                await self._left
        return finished

    def _leave(self) -> None:
        """Let the client read all it was sent, dropping what it sends, and end the connection when
        it has gone or its time is up. A socket closed with bytes unread would take what it has not
        yet delivered with it, be that the end of a blob from before."""
        self._left = self._loop.create_future()
        self._clock.stop(self)
        if self.transport is not None:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.transport.resume_reading()
        self._loop.call_later(_LEAVE_TIME, self.force_close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers where no handler could: a request that is none, or a bug."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun: it can only be cut short")
        if status == 400:
            too_long = isinstance(exc, LineTooLong)
            error = RequestInvalid(
                "a line or a header that is too long" if too_long else "not an HTTP/1.1 request",
                status=431 if too_long else 400,
            )
            log.event(logging.INFO, "client refused", client=self._client(), reason=error)
            response = error_response(error)
        else:
            if exc is not None:
                log.failure("request failed", exc)
            response = internal_error()
        response.headers["Connection"] = "close"
        response.force_close()
        self._last = response
        return response

    def _client(self) -> str | None:
        address = self.peername
        return str(address[0]) if isinstance(address, tuple) else None


class ConnectionServer(web.Server):
    """Makes connections, and knows those that are open: `count` is what a cap is compared with.

    New connections have the limits that `use` said last.
    """

    def __init__(self, handler: Any, serve: Serve) -> None:
        super().__init__(handler)
        self._clock = HeadClock(serve.head_timeout)
        self._open: set[web.RequestHandler] = set()
        self.use(serve)

    def use(self, serve: Serve) -> None:
        self._clock.timeout = serve.head_timeout
        self._connect = partial(
            Connection,
            self,
            clock=self._clock,
            head_limit=serve.head_limit,
            access_log=None,
            max_line_size=serve.line_limit,
            max_field_size=serve.header_limit,
            max_headers=serve.headers,
            keepalive_timeout=serve.keepalive,
            lingering_time=_BODY_TIME,
            # No body is read, so none is unpacked.
            auto_decompress=False,
        )

    @property
    def count(self) -> int:
        return len(self._open)

    def __call__(self) -> web.RequestHandler:
        connection = self._connect()
        self._open.add(connection)
        return connection

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        self.forget(handler)
        super().connection_lost(handler, exc)

    def forget(self, handler: web.RequestHandler) -> None:
        """It has ended, or was never established."""
        self._open.discard(handler)
