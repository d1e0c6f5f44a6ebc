"""A response that sends a blob, from the store or from a file that is still growing.

In chunks where TLS has to see the bytes or they are few, else by sendfile, of which the long ones
are done in threads.

aiohttp's FileResponse waits for whole files and names them by mtime; what is shared with it is the
way the bytes go: headers by the framework, the body from page cache to socket.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ociproxy.store.read_only import BlobFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    from ociproxy.fetch.download.fill import Fill
    from ociproxy.serve.sendfile import Senders


_CHUNK: Final = 64 * 1024
"""Bytes read at once, which is also what a slow client keeps in memory."""
_SHORT: Final = 4 * 1024 * 1024
"""Bytes that the event loop's own thread may send at once: about what a socket's buffer takes in a
millisecond. Handing them to another thread would cost half a millisecond."""


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
    """Whoever does not `send` it calls `close`."""

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

    async def send(self, request: web.BaseRequest, senders: Senders) -> None:
        """Headers and body. Raises OSError where the client left or the file cannot be read, or
        what ended the fill: the response is cut short."""
        try:
            await self.prepare(request)
            await self._send_body(request, senders)
            await self.write_eof()
            # Or a client that reads nothing, and asks again and again, fills the memory with blobs
            # of a chunk.
            await request.writer.drain()
        finally:
            self.close()

    async def _send_body(self, request: web.BaseRequest, senders: Senders) -> None:
        in_clear = _transport(request).get_extra_info("sslcontext") is None
        source, position = self._source, self._first
        offset = source.offset if isinstance(source, BlobFile) else 0
        file: BinaryIO
        while position < self._end:
            if isinstance(source, BlobFile):
                stop, file = self._end, source.file
            else:
                stop = min(await source.available(position), self._end)
                file = self._file = self._file or os.fdopen(source.duplicate_file(), "rb", 0)
            start, size = offset + position, stop - position
            if size > _CHUNK and in_clear:
                sent = await self._send_file(request, senders, file, start, size)
            else:
                sent = await self._send_chunks(file.fileno(), start, size)
            self.sent += sent
            if sent < size:
                # What follows on this connection must not be taken for the bytes that are missing.
                raise ConnectionResetError("the file has become shorter")
            position = stop

    async def _send_file(
        self, request: web.BaseRequest, senders: Senders, file: BinaryIO, start: int, size: int
    ) -> int:
        await _flush(request)
        transport = _transport(request)
        loop = asyncio.get_running_loop()
        try:
            if size > _SHORT:
                return await senders.send(transport, file, start, size)
            return await loop.sendfile(transport, file, start, size, fallback=False)
        except asyncio.SendfileNotAvailableError:
            # Not every file system can, and reading says what is wrong where that is not it.
            return await self._send_chunks(file.fileno(), start, size)

    async def _send_chunks(self, file: int, start: int, size: int) -> int:
        # Reads say where, unlike those that asyncio would fall back to: others may read the file by
        # the same position.
        loop = asyncio.get_running_loop()
        sent = 0
        while sent < size:
            wanted = min(size - sent, _CHUNK)
            chunk = _read_cached(file, wanted, start + sent)
            if not chunk:
                chunk = await loop.run_in_executor(None, os.pread, file, wanted, start + sent)
            if not chunk:
                break
            await self.write(chunk)
            sent += len(chunk)
            # Where the client is fast and all is cached nothing above has waited.
            await asyncio.sleep(0)
        return sent


def _transport(request: web.BaseRequest) -> asyncio.Transport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("client left")
    return transport


async def _flush(request: web.BaseRequest) -> None:
    """Until nothing waits to be written, which the bytes of a file would overtake."""
    transport = _transport(request)
    if transport.get_write_buffer_size():
        transport.set_write_buffer_limits(high=0)
        try:
            await request.writer.drain()
        finally:
            transport.set_write_buffer_limits()


def _read_cached(file: int, size: int, position: int) -> bytes | memoryview:
    """What the page cache has of a file, without waiting for the disk; nothing where it has not."""
    buffer = bytearray(size)
    try:
        found = os.preadv(file, [buffer], position, os.RWF_NOWAIT)
    except OSError:  # not in the cache, or not with this file system
        return b""
    return memoryview(buffer)[:found]
