"""A large document on its way to a client: a manifest, a tags list, a list of referrers.

Short ones are sent by aiohttp, which hands the transport the whole body. A client that reads
nothing would hold it in memory for `serve.client_stall`, once for each connection.

Tests: tests/serve/test_documents.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGE: Final = 64 * 1024
"""Bytes above which a document is sent in pieces."""
NO_SCRIPTS: Final = {"Content-Security-Policy": "sandbox"}
"""The media type of a document is its upstream's, and may be text/html: in a browser its scripts
could read, with the user's password, all that this server has."""
_PIECE: Final = 16 * 1024
"""Bytes written at once: the transport holds 64 KiB and one piece for a client that is slow."""

_sending: dict[bytes, tuple[bytes, int]] = {}
"""Documents that are being sent, each once, and to how many clients. Belongs to the event loop."""


class DocumentResponse(web.StreamResponse):
    """The answer to a GET. All clients that are sent equal bytes share one copy of them."""

    def __init__(self, raw: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers)
        self.sent = 0
        self.content_length = len(raw)
        self._raw = raw

    async def send(self, request: web.BaseRequest) -> None:
        """Send headers and body, at the pace of the client. Raises ConnectionError where it
        left."""
        raw, clients = _sending.get(self._raw, (self._raw, 0))
        self._raw = b""
        _sending[raw] = raw, clients + 1
        try:
            await self.prepare(request)
            view = memoryview(raw)
            for start in range(0, len(raw), _PIECE):
                piece = view[start : start + _PIECE]
                await self.write(piece)
                await request.writer.drain()
                self.sent += len(piece)
            await self.write_eof()
        finally:
            clients = _sending[raw][1] - 1
            if clients:
                _sending[raw] = raw, clients
            else:
                del _sending[raw]
