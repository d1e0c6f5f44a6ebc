"""A client that speaks bytes: for what no HTTP library would send."""

from __future__ import annotations

import re
import socket
import time
from typing import Self

from tests.server import Mirror


class Wire:
    """One plain connection to a server."""

    def __init__(
        self,
        mirror: Mirror,
        timeout: float = 10.0,
        host: str = "",
        *,
        receive_buffer: int | None = None,
    ) -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer is not None:
            # Only what is set before the connection bounds how much the server may be ahead.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect((host or mirror.host, mirror.port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_some(self) -> bytes:
        """What has arrived; nothing where the server has closed the connection, however."""
        try:
            return self.socket.recv(65536)
        except ConnectionError:
            return b""

    def read_to_end(self) -> bytes:
        """All that comes until the server closes the connection; TimeoutError where it does not."""
        said = b""
        while part := self.read_some():
            said += part
        return said

    def ask(self, path: str = "/v2/") -> bytes:
        """An honest request on this connection, and the head of its answer."""
        self.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return self.read_some()

    def seconds_until_closed(self) -> float:
        began = time.monotonic()
        self.read_to_end()
        return time.monotonic() - began


def statuses(said: bytes) -> list[int]:
    """Of all responses in what a server said."""
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", said)]
