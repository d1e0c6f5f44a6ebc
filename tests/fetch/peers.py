"""Peers that a fake upstream cannot be: a proxy, and servers below HTTP."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator


class Proxy:
    """An HTTP proxy that connects everything to one address, and keeps the request lines.

    With `credentials`, as `user:password`, it refuses who does not send them.
    """

    def __init__(self, target: str, *, credentials: str = "") -> None:
        host, _, port = target.partition(":")
        self._target = (host, int(port))
        self._header = b"Proxy-Authorization: Basic " + b64encode(credentials.encode())
        self._open = not credentials
        self.lines: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                target = socket.create_connection(self._target)
                self._sockets += [client, target]
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(65536)
                self.lines.append(head.partition(b"\r\n")[0].decode())
                if not self._open and self._header.lower() not in head.lower():
                    client.sendall(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
                elif head.startswith(b"CONNECT"):
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    target.sendall(re.sub(rb" http://[^/ ]+", b" ", head, count=1))
                for pair in ((client, target), (target, client)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server below HTTP: `answer` gets each connection. Gives host:port."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    answer(client)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
