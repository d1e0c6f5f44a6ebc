"""The connections of one upstream: which addresses they go to, and how long they wait for what.

The address of a connection is known only here, after redirects, token realms and name resolution.
A proxy's address is the operator's choice and is not judged. Behind a proxy only those hosts are
judged that are written as an address.
"""

from __future__ import annotations

import http.client
import io
import math
import re
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family, create_connection

from ociproxy.clock import time_left
from ociproxy.errors import UpstreamForbidden
from ociproxy.fetch.oras.addresses import literal_addresses, refused_kind

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3.response import HTTPResponse

    from ociproxy.config.settings import Upstream

_PIECE: Final = 256 * 1024
"""Bytes that a read gathers. Pieces of 16 KiB cost five times the processor (measured, TLS)."""
_GATHER: Final = 0.02
"""Seconds that a read may gather: as long as the readers of a fill wait between two wake-ups."""
_LEAST: Final = 0.1
"""Seconds that each address gets, however little time is left: a round trip on one continent."""
_ADDRESSES: Final = 8
"""Addresses of one name that are tried. A name may have hundreds, of which each costs `_LEAST`."""
_LOOKUPS: Final = 64
"""Names that may be looked up at once. More than the hosts of one upstream; each is a thread."""

_Found = list[tuple[Any, ...]]


class LookupTimeout(ConnectTimeoutError):
    """The resolver has not answered within the connect time-out."""


class Resolver:
    """Looks up names. Thread-safe.

    getaddrinfo cannot be interrupted, so each call has a thread of its own, which a resolver that
    hangs may keep. Callers that want the same name share one call. A daemon thread, unlike those of
    a pool, does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[_Found]] = {}

    def find(self, host: str, port: int, seconds: float) -> _Found:
        """What getaddrinfo returns. Raises socket.gaierror, and TimeoutError where that takes
        longer than `seconds`, or where `_LOOKUPS` other names do so already."""
        with self._lock:
            looking = self._running.get((host, port))
            if looking is None:
                if len(self._running) >= _LOOKUPS:
                    raise TimeoutError(f"{_LOOKUPS} names are being looked up")
                looking = self._running[host, port] = Future()
                threading.Thread(
                    target=self._look_up, args=(host, port, looking), name="resolver", daemon=True
                ).start()
        return looking.result(seconds)

    def _look_up(self, host: str, port: int, looking: Future[_Found]) -> None:
        try:
            found = socket.getaddrinfo(
                host, port, family=allowed_gai_family(), type=socket.SOCK_STREAM
            )
        except Exception as exc:  # noqa: BLE001 a thread's end: raised by `find`
            looking.set_exception(exc)
        else:
            looking.set_result(found)
        finally:
            with self._lock:
                del self._running[host, port]


_UNLISTED: Final = Resolver()
"""Of all upstreams that clients name: as with their requests, one may hold up the others."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one upstream's connections. `stall` is how many seconds a body may be silent."""

    upstream: str
    listed: bool
    stall: float
    deny_private: bool = False
    resolver: Resolver = field(default_factory=Resolver)

    def refusal(self, address: str) -> str | None:
        """What is wrong with an address that this upstream must not lead to; None for a permitted
        address."""
        kind = refused_kind(address, listed=self.listed, deny_private=self.deny_private)
        if kind is not None and refused_kind(address, listed=True) is None:
            return f"{kind}, where only a registry with an entry in `upstreams` may be"
        return kind

    def check_literal(self, host: str) -> None:
        """Raises UpstreamForbidden for a host that is written as a refused address. For hosts
        behind a proxy: the proxy resolves names, and its result is not seen here."""
        for address in literal_addresses(host):
            if refusal := self.refusal(address):
                raise UpstreamForbidden(self.upstream, f"{host} is {refusal}")

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """A socket to the first permitted address that answers, with what is left of the connect
        time-out as its time-out. The look-up of the name, all addresses and the TLS handshake
        together get the connect time-out.

        A proxy may be at any address. Raises UpstreamForbidden for another host that has only
        refused addresses, and OutOfTime.
        """
        deadline = time.monotonic() + time_left(connection.timeout or math.inf)
        found = self._resolve(connection, deadline - time.monotonic())
        addresses = found[:_ADDRESSES]
        if connection.proxy is None:
            refusals = {address: self.refusal(address) for address in found}
            addresses = [a for a, refusal in refusals.items() if refusal is None][:_ADDRESSES]
            if not addresses:
                reason = f"{connection.host} is {next(iter(refusals.values()))}"
                raise UpstreamForbidden(self.upstream, reason)
        error: OSError | None = None
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            # An address that swallows packets must not use up the time of the next one.
            share = max((deadline - time.monotonic()) / left, _LEAST)
            try:
                sock = create_connection(
                    (address, connection.port), share, socket_options=connection.socket_options
                )
            except OSError as exc:
                error = exc
            else:
                sock.settimeout(max(deadline - time.monotonic(), _LEAST))
                return sock
        if isinstance(error, TimeoutError):
            raise ConnectTimeoutError(connection, f"{connection.host} timed out") from error
        raise NewConnectionError(connection, f"{connection.host}: {error}") from error

    def _resolve(self, connection: HTTPConnection, seconds: float) -> list[str]:
        """The different addresses of the connection's host, at least one."""
        # `_dns_host` keeps the name's final dot, which `host` has lost.
        host = connection._dns_host.strip("[]")
        try:
            found = self.resolver.find(host, connection.port, seconds)
        except socket.gaierror as exc:
            raise NameResolutionError(connection.host, connection, exc) from exc
        except TimeoutError as exc:
            raise LookupTimeout(connection, f"no answer about {connection.host}") from exc
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def policy_of(upstream: Upstream) -> Policy:
    return Policy(
        upstream.name,
        upstream.listed,
        upstream.timeouts.stall,
        upstream.deny_private,
        Resolver() if upstream.listed else _UNLISTED,
    )


class _SocketFile(io.RawIOBase):
    """The reading side of a connection: headers by one deadline, bodies in large pieces.

    A socket's own time-out starts anew with each byte. An upstream that sends a byte now and then
    would hold a thread for ever. The body of a document therefore obeys the request's deadline.

    TLS gives 16 KiB a call, and each piece costs the callers more than its decryption. A read of a
    body therefore gathers `_PIECE` bytes, or what comes within `_GATHER` seconds. Two reads return
    at once: the first one, because a client waits for the first byte, and one that fills the small
    buffer of `BufferedReader`, because http.client looks there for the size of a chunk.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, stall: float) -> None:
        """The time-out of `sock` is that of the headers, `stall` that of each read of a body."""
        self._raw = raw
        self._sock = sock
        self._stall = stall
        self._body_began = False
        self._failure: OSError | None = None
        timeout = sock.gettimeout()
        self.deadline = None if timeout is None else time.monotonic() + timeout
        """When the headers must be complete (monotonic seconds); None once they are."""
        self._began = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        if self.deadline is not None:
            if self._began:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("headers are not complete")
                self._sock.settimeout(left)
            self._began = True
            return self._sock.recv_into(view)
        if self._failure is not None:
            raise self._failure
        self._wait(time_left(self._stall))
        count = self._sock.recv_into(view)
        if self._body_began and count and len(view) > io.DEFAULT_BUFFER_SIZE:
            count = self._gather(view, count)
        self._body_began = True
        return count

    def _wait(self, seconds: float) -> None:
        """Each call of `settimeout` is a system call, for which a thread gives up its turn."""
        if self._sock.gettimeout() != seconds:
            self._sock.settimeout(seconds)

    def _gather(self, view: memoryview, count: int) -> int:
        """Add to the view's first `count` bytes what comes soon; returns how many there are then.
        An error is left to the next read, since the bytes before it are good."""
        enough, until = min(len(view), _PIECE), time.monotonic() + _GATHER
        try:
            self._wait(_GATHER)
            while count < enough and time.monotonic() < until:
                more = self._sock.recv_into(view[count:])
                if not more:
                    break  # the end of the stream, which the next read meets again
                count += more
        except OSError as exc:
            # A time-out with a number is the network's (ETIMEDOUT), not that of `settimeout`.
            if not isinstance(exc, TimeoutError) or exc.errno is not None:
                self._failure = exc.with_traceback(None)  # whose frames would keep the view
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


_PLAIN: Final = re.compile(rb"(?:[!#-'*+\-.0-9A-Z^_`a-z|~]+:[\t -~]*\r\n)+\r\n")
"""Headers of one line each, in ASCII (RFC 9110, section 5.1)."""
_MOST_PLAIN: Final = 100
"""Lines of headers that http.client takes."""


class _PlainHeaders(http.client.HTTPMessage):
    """Of ASCII, so nothing in them has to be looked through for other characters."""

    def get(self, name: str, failobj: Any = None) -> Any:
        wanted = name.lower()
        return next((value for each, value in self.items() if each.lower() == wanted), failobj)

    def items(self) -> list[tuple[str, Any]]:
        return self._fields

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        super().__init__()
        self._fields: list[tuple[str, Any]] = fields
        for name, value in fields:
            self.set_raw(name, value)


def _parse_headers(file: io.BufferedReader[Any]) -> http.client.HTTPMessage:
    """As http.client's, which has them read by the parser of e-mails: a tenth of the processor time
    of a short request. Plain headers that have arrived as a whole, as most do, are read here."""
    arrived = file.peek()
    plain = _PLAIN.match(arrived)
    if plain is None or plain[0].count(b"\n") > _MOST_PLAIN:
        return http.client.parse_headers(file)
    lines = file.read(plain.end()).decode("ascii").split("\r\n")[:-2]
    fields = (line.partition(":") for line in lines)
    return _PlainHeaders([(name, value.lstrip(" \t")) for name, _, value in fields])


_begin = FunctionType(
    http.client.HTTPResponse.begin.__code__,
    {**vars(http.client), "parse_headers": _parse_headers},
)
"""http.client's own, with other eyes for the headers."""


class _Response(http.client.HTTPResponse):
    """http.client's response, read through a `_SocketFile`."""

    stall: float

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._file = _SocketFile(self.fp.detach(), sock, self.stall)
        self.fp = io.BufferedReader(self._file)

    def begin(self) -> None:
        _begin(self)
        if self.length is None and not self.chunked and "Content-Length" in self.headers:
            # http.client would read until the connection ends, and take a cut body for a whole one.
            raise http.client.HTTPException("Content-Length is not a number")
        self._file.deadline = None


class _Policed(HTTPConnection):
    """urllib3's connection under a policy, which `pool_classes` sets."""

    policy: Policy
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        return self.policy.connect(self)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as urllib3 itself narrows it
        self.timeout = time_left(self.timeout or math.inf)
        return super().getresponse()


def pool_classes(policy: Policy) -> dict[str, type[HTTPConnectionPool]]:
    """Connection pools by URL scheme, as `PoolManager.pool_classes_by_scheme` takes them: classes,
    so each policy gets classes of its own."""
    response = type("Response", (_Response,), {"stall": policy.stall})
    attributes = {"policy": policy, "response_class": response}
    plain = type("Connection", (_Policed,), attributes)
    secure = type("TlsConnection", (_Policed, HTTPSConnection), attributes)
    return {
        "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
