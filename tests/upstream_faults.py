"""What a fake upstream can be told to do wrong, and the sending of a body that does it."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One answer's misbehaviour. Fields combine; the defaults are what a good registry does."""

    # Before the body
    delay: float = 0.0
    """Seconds before the response headers; ended early by `FakeUpstream.release()`."""
    drop: bool = False
    """Close the connection without an answer."""
    status: int | None = None
    """Answer with this status and an OCI error body, which has this code."""
    code: str = "UNKNOWN"
    retry_after: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Answer 200 (or `status`) with these bytes in place of the content."""
    content_type: str | None = None
    redirect: str | None = None
    """307 to the same path under this base URL."""
    digest_header: str | None = None
    """Another `Docker-Content-Digest`; the empty string leaves it out."""
    # The body
    no_range: bool = False
    """Answer 200 and everything to a Range request, and promise no ranges."""
    chunked: bool = False
    """No Content-Length."""
    length_delta: int = 0
    """Content-Length is wrong by this much: negative cuts the body, positive never comes."""
    flip_at: int | None = None
    """Invert the byte at this offset of the content (of the whole, not of the range)."""
    compress: Literal["", "accepted", "always"] = ""
    """Content-Encoding: gzip, when the client accepts it or always."""
    cut_after: int | None = None
    """Close the connection after this many body bytes."""
    reset: bool = False
    """A cut is a TCP reset: bytes just written may not arrive either."""
    stall_after: int | None = None
    """Send this many body bytes, then nothing until `FakeUpstream.release()`."""
    rate: int | None = None
    """Body bytes a second on each connection."""


HTML = Fault(
    body=b"<!DOCTYPE html><html><body>Please sign in to the hotel network</body></html>",
    content_type="text/html; charset=utf-8",
    digest_header="",
)


def too_many_requests(retry_after: str = "7") -> Fault:
    return Fault(status=429, retry_after=retry_after)


@dataclass(slots=True)
class Request:
    """One line of the request log; `sent` grows while the body is written."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    done: bool = False
    raw_query: str = ""
    """As it came, where `query` is decoded."""
    certificate: bool = False
    """Whether the client showed one."""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""


def error(status: int, code: str, fault: Fault | None = None) -> web.Response:
    headers = dict(fault.headers) if fault else {}
    if fault and fault.retry_after is not None:
        headers["Retry-After"] = fault.retry_after
    body = {"code": code, "message": "the fake upstream was told so", "detail": None}
    return web.json_response({"errors": [body]}, status=status, headers=headers)


async def send(
    request: web.Request,
    entry: Request,
    data: bytes,
    headers: dict[str, str],
    fault: Fault,
    released: asyncio.Event,
) -> web.StreamResponse:
    """Send `data` (whole or the range asked for) as `fault` wants it; count what was written."""
    if fault.flip_at is not None:
        flipped = bytearray(data)
        flipped[fault.flip_at] ^= 0xFF
        data = bytes(flipped)
    accepts_gzip = "gzip" in request.headers.get("Accept-Encoding", "")
    if fault.compress == "always" or (fault.compress and accepts_gzip):
        data = gzip.compress(data, mtime=0)
        headers["Content-Encoding"] = "gzip"
    status = fault.status or 200
    body = memoryview(data)
    if not fault.no_range:
        headers["Accept-Ranges"] = "bytes"
        status, body = _ranged(request, body, headers, status)
    response = web.StreamResponse(status=status, headers=headers)
    entry.status = status
    promised = len(body) + fault.length_delta
    if fault.chunked:
        response.enable_chunked_encoding()
    else:
        response.content_length = promised
    await response.prepare(request)
    if request.method == "HEAD":
        await response.write_eof()
        return response
    await _write(request, response, entry, body[: max(promised, 0)], fault, released)
    if fault.length_delta > 0:
        close(request)
    await response.write_eof()
    return response


def _ranged(
    request: web.Request, body: memoryview, headers: dict[str, str], status: int
) -> tuple[int, memoryview]:
    wanted = request.http_range
    if wanted.start is None and wanted.stop is None:
        return status, body
    start, stop, _ = wanted.indices(len(body))
    if start >= stop:
        headers["Content-Range"] = f"bytes */{len(body)}"
        return 416, memoryview(b"")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
    return 206, body[start:stop]


async def _write(
    request: web.Request,
    response: web.StreamResponse,
    entry: Request,
    body: memoryview,
    fault: Fault,
    released: asyncio.Event,
) -> None:
    # A slow body goes out in about ten pieces a second, so that the first byte is not late too.
    step = CHUNK if fault.rate is None else max(1, min(CHUNK, fault.rate // 10))
    stops = {
        stop for stop in (fault.stall_after, fault.cut_after) if stop is not None and stop >= 0
    }
    at = 0
    while True:
        if at == fault.stall_after:
            await released.wait()
        if at == fault.cut_after:
            close(request, reset=fault.reset)
            return
        if at >= len(body):
            return
        end = min([at + step, len(body), *(stop for stop in stops if stop > at)])
        # Counted first, for a client may see the bytes before `write` returns here.
        entry.sent += end - at
        try:
            await response.write(body[at:end])
        except ConnectionError:
            entry.sent -= end - at
            raise
        if fault.rate is not None:
            await asyncio.sleep((end - at) / fault.rate)
        at = end


def close(request: web.Request, *, reset: bool = False) -> None:
    transport = request.transport
    if transport is None:
        return
    if reset:
        transport.abort()
    else:
        transport.close()
