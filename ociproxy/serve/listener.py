"""Accepts connections on a port: from which networks, how many at once, under which TLS.

A client outside `serve.networks` is disconnected before a byte is exchanged. Above
`serve.connections` the client that has the most loses one to a client with fewer; where there is no
such client, a few are answered 503 and the rest are disconnected. Each process counts for itself:
workers share the port, not their counts. The admin listener always ends an older connection:
strangers that hold connections open must not keep probes out.

Tests: tests/serve/test_limits.py, tests/serve/test_networks.py, tests/serve/test_tls.py,
tests/serve/admin/test_listener.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import resource
import signal
import socket
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import AddressInUse, Busy
from ociproxy.serve.connection import Connection, ConnectionServer
from ociproxy.serve.errors import error_response
from ociproxy.serve.tls import PLAIN_HTTP, handshake_failure

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from aiohttp import web

    from ociproxy.config.local_settings import Network, Serve

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What a process that serves a listener handles."""
_BACKLOG: Final = 1024
_AT_ONCE: Final = 64
"""Connections accepted before running requests get their turn."""
_TOLD_BUSY: Final = 64
"""Connections above the cap that are answered 503; further ones are closed at once."""
_BUSY_TIME: Final = 5.0
"""Seconds that such a connection may take to send its request."""
_PAUSE: Final = 0.5
"""Seconds without accepting after an error of the system, such as no free file: retrying at once
would spin."""
_SHUTDOWN_TIME: Final = 5.0
"""Seconds for a client to acknowledge the end of TLS."""
_LOOK: Final = 0.02
"""Seconds between two looks at the connections that are left at the end."""
_CUT_TIME: Final = 0.25
"""Seconds that the handler of a response has to end once it is told to."""
_SPARE_FILES: Final = 256
"""Files kept free for the store and for connections to upstreams."""
_SAY_AGAIN: Final = 60.0
"""Seconds between two warnings that older connections end for newer ones."""


def listen(host: str, port: int, *, client_stall: float) -> socket.socket:
    """A listening socket. Raises AddressInUse, with the reason, for every failure."""
    try:
        family, *_, address = socket.getaddrinfo(
            _without_brackets(host) or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(
            address[:2],
            family=family,
            backlog=_BACKLOG,
            dualstack_ipv6=family == socket.AF_INET6 and address[0] == "::",
        )
    except (OSError, UnicodeError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        number = getattr(exc, "errno", None)
        if number == errno.EADDRINUSE:
            reason = "the port is in use"
        elif number == errno.EADDRNOTAVAIL:
            reason = "no address of this machine"
        elif number == errno.EACCES:
            reason = "permission denied; ports from 1024 need none"
        raise AddressInUse(host, port, reason) from exc
    # The kernel drops a client that acknowledges no data for this long. Accepted sockets inherit
    # the option.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(client_stall * 1000))
    return listener


def _without_brackets(host: str) -> str:
    """The host without the brackets of an IPv6 address in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host


class Listener:
    """Belongs to one event loop. Accepts from `open` until `stop_accepting`."""

    def __init__(
        self,
        listener: socket.socket,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        serve: Serve,
        context: ssl.SSLContext | None,
        *,
        newest_first: bool = False,
    ) -> None:
        """With `newest_first` a connection above the cap takes the place of an older one."""
        self._newest_first = newest_first
        self._say_from = 0.0
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._server = ConnectionServer(handler, serve)
        self._busy = ConnectionServer(_say_busy, _hurried(serve))
        self._arriving: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self.use(serve, context)

    def use(self, serve: Serve, context: ssl.SSLContext | None) -> None:
        """Apply this configuration to new connections; open ones keep theirs."""
        self._context = context
        self._networks = serve.networks
        self._handshake_timeout = serve.handshake_timeout
        self._limit = _affordable(serve.connections, secure=context is not None)
        self._server.serve = serve
        self._busy.serve = _hurried(serve)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def count(self) -> int:
        """Connections that are open."""
        return self._server.count

    def open(self) -> None:
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def stop_accepting(self) -> None:
        """Connections that wait to be accepted are refused; their clients go elsewhere."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._arriving:
            task.cancel()

    async def finish(self) -> None:
        """After `stop_accepting`. Close idle connections, and the others after the response that
        is running. Return when none is open."""
        servers = (self._server, self._busy)
        while any(server.count for server in servers):
            for server in servers:
                server.pre_shutdown()
            # Again and again: a connection that was made just now is idle a moment later.
            await asyncio.sleep(_LOOK)

    async def cut(self) -> None:
        """End the responses that are running."""
        await asyncio.gather(self._server.cut(_CUT_TIME), self._busy.cut(_CUT_TIME))

    def _accept(self) -> None:
        # One at a time where a newer one ends an older one: that has to be established by then.
        for _ in range(1 if self._newest_first else _AT_ONCE):
            try:
                client, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._pause(exc)
                return
            self._admit(client, str(address[0]))

    def _pause(self, reason: OSError) -> None:
        log.event(logging.ERROR, "cannot accept clients", reason=reason.strerror)
        self._loop.remove_reader(self._listener)
        self._paused = self._loop.call_later(_PAUSE, self.open)

    def _admit(self, client: socket.socket, host: str) -> None:
        if self._networks and not is_within(host, self._networks):
            client.close()
            log.event(logging.INFO, "client refused", client=host, reason="not in serve.networks")
            return
        server = self._server
        newcomer = None if self._newest_first else host
        if server.count >= self._limit and server.end_one(newcomer):
            self._say_full(host)
        if server.count >= self._limit:
            server = self._busy
            if server.count >= _TOLD_BUSY:
                client.close()
                log.event(
                    logging.WARNING, "client refused", client=host, reason="too many connections"
                )
                return
        client.setblocking(False)
        connection = server(host)
        task = self._loop.create_task(self._establish(client, host, server, connection))
        connection.arriving = task
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _say_full(self, host: str) -> None:
        now = self._loop.time()
        if now >= self._say_from:
            self._say_from = now + _SAY_AGAIN
            reason = "a newer connection ends one of the client that has the most"
            log.event(
                logging.WARNING, "too many connections", port=self.port, client=host, reason=reason
            )

    async def _establish(
        self,
        client: socket.socket,
        host: str,
        server: ConnectionServer,
        connection: Connection,
    ) -> None:
        secure = self._context is not None
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_timeout if secure else None,
                ssl_shutdown_timeout=_SHUTDOWN_TIME if secure else None,
            )
        except OSError as exc:
            server.forget(connection)
            # A port scan or a TCP probe is not worth a line; a bad certificate is.
            level = logging.DEBUG if isinstance(exc, ConnectionError) else logging.INFO
            reason = handshake_failure(exc) if secure else str(exc)
            if reason == PLAIN_HTTP:
                level = server.level_of_scheme(host)
            log.event(level, "client refused", client=host, reason=reason)
        except BaseException:
            server.forget(connection)
            raise


def _hurried(serve: Serve) -> Serve:
    return dataclasses.replace(serve, head_timeout=min(serve.head_timeout, _BUSY_TIME))


async def _say_busy(request: web.BaseRequest) -> web.StreamResponse:
    response = error_response(Busy("too many connections: serve.connections is reached"))
    response.force_close()
    return response


def is_within(host: str, networks: tuple[Network, ...]) -> bool:
    """Whether an address is in one of the networks; an IPv4-mapped IPv6 address counts as IPv4."""
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def _affordable(connections: int, *, secure: bool) -> int:
    """`serve.connections`, lowered to what the limit on open files allows.

    A connection needs a socket and a file. Without TLS it needs both twice, because a thread sends
    with duplicates. Raises the soft limit to the hard one first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return connections
    affordable = max(1, (soft - _SPARE_FILES) // (2 if secure else 4))
    if affordable < connections:
        log.event(
            logging.WARNING,
            "fewer connections than configured",
            connections=affordable,
            configured=connections,
            reason=f"the process may have {soft} files open",
        )
    return min(affordable, connections)
