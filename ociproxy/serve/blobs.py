"""GET and HEAD /v2/<name>/blobs/<digest>, and the response that sends a blob or parts of it.

A blob is sent from the store, or from a file that still grows. Headers go out by aiohttp. The body
goes by sendfile from the page cache to the socket; under TLS, or where it is short, in chunks.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ociproxy.errors import StoreError
from ociproxy.fetch.cache_status import PASSED_THROUGH
from ociproxy.serve.errors import range_response
from ociproxy.serve.exchange import Answer, client_has, requested_ranges
from ociproxy.store.files import UNREADABLE
from ociproxy.store.read_only import BlobFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from typing import BinaryIO

    from ociproxy.fetch.cache_status import CacheStatus
    from ociproxy.fetch.download.fill import Fill
    from ociproxy.fetch.engine import Engine
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.oci.digest import Digest
    from ociproxy.serve.exchange import BlobPath
    from ociproxy.serve.sendfile import Senders

_CHUNK: Final = 64 * 1024
"""Bytes read at once, and so what one slow client keeps in memory."""
_SHORT: Final = 4 * 1024 * 1024
"""Bytes that the event loop's thread sends by itself: the socket's buffer takes them in about a
millisecond, and handing them to another thread costs half of one."""
_LOOK: Final = 1024 * 1024
"""Bytes. A range of so many up to the blob's end is a look at the end, where eStargz and
zstd:chunked keep their tables. A longer one may be the last piece of a download."""

_SAMPLE: Final = 128 * 1024
"""Bytes between two samples: the kernel reads ahead, and so forgets, about as much at a time."""


async def blob(engine: Engine, request: web.BaseRequest, target: BlobPath) -> Answer:
    """Stored or arriving, whole or some ranges of it."""
    repository, digest = target.repository, target.digest
    headers = {
        "Docker-Content-Digest": str(digest),
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if request.method == "HEAD":
        size, status = await engine.blobs.size(repository, digest)
        if client_has(request, digest):
            return _not_modified(headers, status, digest)
        headers["Content-Length"] = str(size)
        return Answer(web.Response(headers=headers), status, digest)
    source, status = await engine.blobs.pull(repository, digest)
    relay = partial(engine.blobs.relay, repository, digest)
    response = BlobResponse(source, headers, relay, engine.threads)
    if client_has(request, digest):
        response.close()
        return _not_modified(headers, status, digest)
    if source.size is None:
        # Without a length and in one piece: the body's end comes once all of it is verified.
        return Answer(response, status, digest)
    wanted = requested_ranges(request, source.size)
    if wanted is None:
        response.close()
        return Answer(range_response(source.size), status, digest)
    if status is PASSED_THROUGH and not _read_on(wanted):
        wanted = []  # the whole blob, as RFC 9110 section 14.2 allows
    # `bytes=N-` is how a client goes on with a download that broke: its end is verified.
    goes_on = request.headers.get("Range", "").rstrip().endswith("-")
    response.limit_to(wanted, source.size, looks=not goes_on)
    return Answer(response, status, digest)


def _read_on(ranges: Sequence[tuple[int, int | None]]) -> bool:
    """Whether none begins before the end of the one before: what passes through is read once."""
    return all(stop is not None and stop <= start for (_, stop), (start, _) in pairwise(ranges))


def _not_modified(headers: dict[str, str], status: CacheStatus, digest: Digest) -> Answer:
    del headers["Content-Type"]
    return Answer(web.Response(status=304, headers=headers), status, digest)


class BlobResponse(web.StreamResponse):
    """Holds a file open until `send` returns; where `send` is not called, `close` must be."""

    def __init__(
        self,
        source: BlobFile | Fill,
        headers: Mapping[str, str],
        relay: Callable[[StoreError], Awaitable[Fill]],
        threads: StoreThreads,
    ) -> None:
        """`relay` gets the blob past the store, where that fails while the blob arrives."""
        super().__init__(headers=headers)
        self._relay = relay
        self._threads = threads
        self.sent = 0
        self._source = source
        self._parts: list[tuple[bytes, int, int | None]] = [(b"", 0, source.size)]
        """What is left to send: each range, without an end to the blob's, and what goes before."""
        self._tail = b""
        self._looks = False
        self._sized = source.size is not None
        # A fill's file is opened with its first bytes, and again where the fill has gone on in
        # another one, as it does when the process was stopped that fetched the blob.
        self._file_number = 0
        self._file: BinaryIO | None = source.file if isinstance(source, BlobFile) else None

    def limit_to(self, ranges: Sequence[tuple[int, int]], size: int, *, looks: bool) -> None:
        """Send these ranges of the `size` bytes, several of them as multipart/byteranges (RFC 9110,
        section 14.6); the whole blob where there are none. With `looks`, short ranges at the end do
        not wait for the verification of all before them."""
        self._looks = looks and bool(ranges)
        self._parts = [(b"", start, stop) for start, stop in ranges or [(0, size)]]
        if len(ranges) == 1:
            [(start, stop)] = ranges
            self.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        elif ranges:
            # At random, so that no blob can be made that holds it.
            boundary = secrets.token_hex(16)
            head = f"\r\n--{boundary}\r\nContent-Type: {self.headers['Content-Type']}\r\n"
            self._parts = [
                (f"{head}Content-Range: bytes {a}-{b - 1}/{size}\r\n\r\n".encode(), a, b)
                for a, b in ranges
            ]
            self._tail = f"\r\n--{boundary}--\r\n".encode()
            self.headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        if ranges:
            self.set_status(206)
        length = sum(len(head) + stop - start for head, start, stop in self._parts if stop)
        self.content_length = length + len(self._tail)

    def close(self) -> None:
        self._close_file()
        if not isinstance(self._source, BlobFile):
            self._source.leave()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    async def send(self, request: web.BaseRequest, senders: Senders) -> None:
        """Send headers and body. Raises OSError where the client left or the file cannot be read,
        and the error that ended the fill; the response is then cut short."""
        try:
            await self.prepare(request)
            await self._send_body(request, senders)
            await self.write_eof()
            # A client that asks again and again and reads nothing would otherwise fill the memory
            # with blobs of one chunk.
            await request.writer.drain()
        finally:
            self.close()

    async def _send_body(self, request: web.BaseRequest, senders: Senders) -> None:
        source = self._source
        try:
            with nullcontext() if isinstance(source, BlobFile) else source.reading():
                await self._send_parts(source, request, senders)
            return
        except StoreError as exc:
            if not _read_on([(start, stop) for _, start, stop in self._parts]):
                raise
            self.close()
            self._file, self._source = None, await self._relay(exc)
        with self._source.reading():
            await self._send_parts(self._source, request, senders)

    async def _send_parts(
        self, source: BlobFile | Fill, request: web.BaseRequest, senders: Senders
    ) -> None:
        """Send what is left of them."""
        while self._parts:
            head, start, stop = self._parts[0]
            await self._write(head)
            self._parts[0] = (b"", start, stop)
            await self._send_part(source, request, senders)
            del self._parts[0]
        await self._write(self._tail)

    async def _write(self, data: bytes) -> None:
        if data:
            await self.write(data)
            self.sent += len(data)

    async def _send_part(
        self, source: BlobFile | Fill, request: web.BaseRequest, senders: Senders
    ) -> None:
        in_clear = _transport(request).get_extra_info("sslcontext") is None
        _, position, end = self._parts[0]
        early = self._looks and position > 0 and end is not None and end - position <= _LOOK
        offset = source.offset if isinstance(source, BlobFile) else 0
        file: BinaryIO
        while end is None or position < end:
            if isinstance(source, BlobFile):
                stop, file = end or source.size, source.file
            else:
                stop = await source.available(position, early=early)
                end = source.size if end is None else end
                stop = stop if end is None else min(stop, end)
                file = await self._fill_file(source)
            start, size = offset + position, stop - position
            try:
                if size > _CHUNK and in_clear and self._sized:
                    sent = await self._send_file(request, senders, file, start, size)
                else:
                    sent = await self._send_chunks(file.fileno(), start, size)
            except OSError as exc:
                if exc.errno not in UNREADABLE:
                    raise
                raise self._unreadable(exc) from exc
            if sent < size:
                # The client must not take the next response for the missing bytes.
                raise ConnectionResetError("the file has become shorter")
            position = self._parts[0][1]

    def _count(self, size: int) -> None:
        """Bytes of the part that is being sent are on their way to the client."""
        self.sent += size
        _, position, end = self._parts[0]
        self._parts[0] = (b"", position + size, end)

    async def _fill_file(self, fill: Fill) -> BinaryIO:
        if self._file is None or self._file_number != fill.files:
            self._close_file()
            self._file_number = fill.files
            opening = partial(_open_anew, fill)
            try:
                if fill.on_disk:
                    self._file = await self._threads.open(opening, _close)
                else:
                    self._file = opening()
            except OSError as exc:  # of a network file system, when the fill has failed
                raise self._unreadable(exc) from exc
        return self._file

    def _unreadable(self, error: OSError) -> StoreError:
        digest = Path(self.headers["Docker-Content-Digest"])
        return StoreError(digest, (error.strerror or str(error)).lower())

    async def _send_file(
        self, request: web.BaseRequest, senders: Senders, file: BinaryIO, start: int, size: int
    ) -> int:
        await _flush(request)
        transport = _transport(request)
        loop = asyncio.get_running_loop()
        try:
            if size > _SHORT or not self._is_at_hand(file, start, size):
                sent = await senders.send(transport, file, start, size)
            else:
                sent = await loop.sendfile(transport, file, start, size, fallback=False)
        except asyncio.SendfileNotAvailableError:
            # The file system has no sendfile; or the file is unreadable, which reading reports.
            return await self._send_chunks(file.fileno(), start, size)
        except OSError as exc:
            if exc.errno in UNREADABLE:
                # asyncio has moved the file's position by what it sent before.
                self._count(file.tell() - start)
            raise
        self._count(sent)
        return sent

    def _is_at_hand(self, file: BinaryIO, start: int, size: int) -> bool:
        """Whether the page cache has the bytes, by samples: else the event loop would wait for the
        disk. What is arriving was written just now."""
        if not isinstance(self._source, BlobFile):
            return True
        samples = (*range(start, start + size, _SAMPLE), start + size - 1)
        return all(_read_cached(file.fileno(), 1, position) for position in samples)

    async def _send_chunks(self, file: int, start: int, size: int) -> int:
        # pread, because asyncio's fallback uses the file's position.
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
            self._count(len(chunk))
            sent += len(chunk)
            # With a fast client and cached bytes nothing above has let other tasks run.
            await asyncio.sleep(0)
        return sent


def _open_anew(fill: Fill) -> BinaryIO:
    """The arriving bytes; the caller closes the file. A duplicate would share its position with
    those of other responses."""
    with os.fdopen(fill.duplicate_file(), "rb", 0) as shared:
        return open(f"/proc/self/fd/{shared.fileno()}", "rb", 0)  # noqa: PTH123 a number


def _close(file: BinaryIO) -> None:
    file.close()


def _transport(request: web.BaseRequest) -> asyncio.Transport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("client left")
    return transport


async def _flush(request: web.BaseRequest) -> None:
    """Wait until the transport has written everything: sendfile would overtake the rest."""
    transport = _transport(request)
    if transport.get_write_buffer_size():
        transport.set_write_buffer_limits(high=0)
        try:
            await request.writer.drain()
        finally:
            transport.set_write_buffer_limits()


def _read_cached(file: int, size: int, position: int) -> bytes | memoryview:
    """Bytes of a file that are in the page cache; b"" where the disk would have to be read."""
    buffer = bytearray(size)
    try:
        found = os.preadv(file, [buffer], position, os.RWF_NOWAIT)
    except OSError:  # not cached, or the file system has no RWF_NOWAIT
        return b""
    return memoryview(buffer)[:found]
