"""A response that sends a blob, from the store or from a file that is still growing.

By sendfile, or in chunks where TLS has to see the bytes.

aiohttp's FileResponse waits for whole files, names them by mtime and uses the event loop's own
threads; what is shared with it is the way the bytes go: headers by the framework, the body from
page cache to socket.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ociproxy.store.layers import BlobFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    from aiohttp.abc import AbstractStreamWriter

    from ociproxy.fetch.fill import Fill


_CHUNK: Final = 64 * 1024
"""Bytes read at once for TLS, which is also what a slow client keeps in memory."""


def requested_range(request: web.BaseRequest, size: int) -> tuple[int, int, bool] | None:
    """The bytes to send as [start, stop), and whether a range was asked for; None cannot be
    satisfied.

    One range is honoured. Several, other units, and If-Range with anything but our ETag get the
    whole, as RFC 9110 section 14.2 allows.
    """
    header = request.headers.get("Range")
    if header is None or not _may_range(request):
        return 0, size, False
    unit, _, spec = header.partition("=")
    if unit.strip().lower() != "bytes" or "," in spec:
        return 0, size, False
    try:
        wanted = request.http_range
    except ValueError:
        return None
    start, stop, _ = wanted.indices(size)
    if start >= stop:
        return None
    return start, stop, True


def _may_range(request: web.BaseRequest) -> bool:
    condition = request.headers.get("If-Range")
    return condition is None or condition.strip('"') == request.rel_url.path.rpartition("/")[2]


class BlobResponse(web.StreamResponse):
    """Sends its body in `prepare`; whoever does not let it come to that calls `close`."""

    def __init__(self, source: BlobFile | Fill, headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers)
        self.sent = 0
        self._source = source
        self._first, self._end = 0, source.size
        # That of a fill is opened with its first bytes: until then it may become another one.
        self._file: BinaryIO | None = source.file if isinstance(source, BlobFile) else None

    def limit_to(self, start: int, stop: int, partial: bool) -> None:
        self._first, self._end = start, stop
        self.content_length = stop - start
        if partial:
            self.set_status(206)
            self.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{self._source.size}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Raises ConnectionError where the client left, or the fill failed and the response is
        cut short."""
        if self.prepared:
            return await super().prepare(request)
        try:
            writer = await super().prepare(request)
            await self._send(request)
            await super().write_eof()
            return writer
        finally:
            self.close()

    async def _send(self, request: web.BaseRequest) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("client left")
        in_clear = transport.get_extra_info("sslcontext") is None
        source, position = self._source, self._first
        offset = source.offset if isinstance(source, BlobFile) else 0
        file: BinaryIO
        while position < self._end:
            if isinstance(source, BlobFile):
                stop, file = self._end, source.file
            else:
                stop = min(await source.available(position), self._end)
                file = self._file = self._file or os.fdopen(source.duplicate_file(), "rb", 0)
            if transport.is_closing():
                raise ConnectionResetError("client left")
            if in_clear:
                sent = await asyncio.get_running_loop().sendfile(
                    transport, file, offset + position, stop - position
                )
                if sent < stop - position:
                    raise _shrunk()
            else:
                await self._send_chunks(file.fileno(), offset + position, offset + stop)
            self.sent += stop - position
            position = stop

    async def _send_chunks(self, file: int, position: int, stop: int) -> None:
        # Reads say where: the file's own position may be shared with others who read it.
        loop = asyncio.get_running_loop()
        while position < stop:
            size = min(stop - position, _CHUNK)
            chunk = _read_cached(file, size, position)
            if not chunk:
                chunk = await loop.run_in_executor(None, os.pread, file, size, position)
            if not chunk:
                raise _shrunk()
            await self.write(chunk)
            position += len(chunk)
            # Where the client is fast and all is cached nothing above has waited.
            await asyncio.sleep(0)


def _shrunk() -> ConnectionResetError:
    """What follows on this connection must not be taken for the bytes that are missing."""
    return ConnectionResetError("the file has become shorter")


def _read_cached(file: int, size: int, position: int) -> bytes | memoryview:
    """What the page cache has of a file, without waiting for the disk; nothing where it has not."""
    buffer = bytearray(size)
    try:
        found = os.preadv(file, [buffer], position, os.RWF_NOWAIT)
    except OSError:  # not in the cache, or not with this file system
        return b""
    return memoryview(buffer)[:found]
