"""Where connections go: the connection classes that refuse addresses and time what they wait for.

The address really connected to is known only here, below redirects, token realms and name
resolution. Behind a proxy that is the proxy's own address, which is the operator's choice and not
judged: there only hosts that are written as an address are.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family, create_connection

from ociproxy.errors import UpstreamForbidden
from ociproxy.fetch.oras.addresses import literal_addresses, refused_kind

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3.response import HTTPResponse

_PIECE: Final = 256 * 1024
"""Bytes: with 16 KiB a blob over TLS cost five times the processor time (measured on loopback)."""
_GATHER: Final = 0.02
"""Seconds: as long as the readers of a fill wait between two wake-ups."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Whose connections these are, which addresses they may go to, and how long a body may be
    silent."""

    upstream: str
    listed: bool
    stall: float
    deny_private: bool = False

    def refusal(self, address: str) -> str | None:
        """The kind of address that this upstream must not lead to, or None where it may."""
        return refused_kind(address, listed=self.listed, deny_private=self.deny_private)

    def check_literal(self, host: str) -> None:
        """Raises UpstreamForbidden for a host that is written as a refused address: behind a proxy
        nobody here sees what a name resolves to."""
        for address in literal_addresses(host):
            refusal = self.refusal(address)
            if refusal is not None:
                raise UpstreamForbidden(self.upstream, f"{host} is {refusal}")

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """The first address that answers, of those permitted; together within the connect timeout.

        Raises UpstreamForbidden if the name has only refused ones.
        """
        addresses, refused = self._resolve(connection)
        if not addresses:
            raise UpstreamForbidden(self.upstream, f"{connection.host} is {refused}")
        timeout = connection.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        error: OSError | None = None
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            # One address that swallows packets must not use up the time of the next.
            share = None if deadline is None else max((deadline - time.monotonic()) / left, 0.1)
            try:
                return create_connection(
                    (address, connection.port), share, socket_options=connection.socket_options
                )
            except OSError as exc:
                error = exc
        if isinstance(error, TimeoutError):
            raise ConnectTimeoutError(connection, f"{connection.host} timed out") from error
        raise NewConnectionError(connection, f"{connection.host}: {error}") from error

    def _resolve(self, connection: HTTPConnection) -> tuple[list[str], str | None]:
        # `_dns_host` is the name with its final dot, as urllib3's own connect uses it.
        host = connection._dns_host.strip("[]")
        try:
            found = socket.getaddrinfo(
                host, connection.port, family=allowed_gai_family(), type=socket.SOCK_STREAM
            )
        except socket.gaierror as exc:
            raise NameResolutionError(connection.host, connection, exc) from exc
        refused = None
        permitted = []
        for address in dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found):
            refusal = self.refusal(address)
            if refusal is None:
                permitted.append(address)
            else:
                refused = refusal
        return permitted, refused


class _SocketFile(io.RawIOBase):
    """The reading side of a connection: headers within one deadline, bodies in large pieces.

    A socket's own time-out starts anew with each byte, so an upstream that sends one now and then
    would keep a thread for ever.

    TLS gives 16 KiB a call, and every piece costs the callers above more than its decryption: a
    read of a body goes on until it has `_PIECE` bytes, or for `_GATHER` seconds. The first read of
    a body does not, for a client waits for the first byte.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._body_began = False
        self._failure: OSError | None = None
        timeout = sock.gettimeout()
        self.deadline = None if timeout is None else time.monotonic() + timeout
        """When the headers have to be complete (monotonic seconds); None once they are."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("headers are not complete")
            self._sock.settimeout(left)
            return self._sock.recv_into(view)
        if self._failure is not None:
            raise self._failure
        count = self._sock.recv_into(view)
        if self._body_began and count:
            count = self._gather(view, count)
        self._body_began = True
        return count

    def _gather(self, view: memoryview, count: int) -> int:
        """Add what comes soon to the `count` bytes that are in the view. An error is kept for the
        next read: what came before it is good."""
        enough, until = min(len(view), _PIECE), time.monotonic() + _GATHER
        stall = self._sock.gettimeout()
        try:
            while count < enough and (left := until - time.monotonic()) > 0:
                self._sock.settimeout(left)
                more = self._sock.recv_into(view[count:])
                if not more:
                    break
                count += more
        except TimeoutError:
            pass
        except OSError as exc:
            self._failure = exc
        finally:
            with suppress(OSError):  # closed by `abort`
                self._sock.settimeout(stall)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._file = _SocketFile(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._file)

    def begin(self) -> None:
        super().begin()
        if self.length is None and not self.chunked and "Content-Length" in self.headers:
            # http.client would read on until the connection ends, and then nothing is ever cut
            # short.
            raise http.client.HTTPException("Content-Length is not a number")
        self._file.deadline = None


class _Policed(HTTPConnection):
    """Set as `policy` by `pool_classes`; everything else is urllib3's."""

    policy: Policy
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        return super()._new_conn() if self.proxy is not None else self.policy.connect(self)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as urllib3 itself narrows it
        sock = self.sock
        response = super().getresponse()
        # The headers are there; from here on silence is a stall, which has its own bound.
        sock.settimeout(self.policy.stall)
        return response


class _PolicedTls(_Policed, HTTPSConnection):
    """The same over TLS."""


def pool_classes(policy: Policy) -> dict[str, type[HTTPConnectionPool]]:
    """What `PoolManager.pool_classes_by_scheme` takes: urllib3 makes connections of classes it is
    given, so the policy is an attribute of two classes made for it."""

    class Connection(_Policed):
        pass

    class TlsConnection(_PolicedTls):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    Connection.policy = TlsConnection.policy = policy
    return {"http": Pool, "https": TlsPool}
