"""`POST /api/load`: a child process loads the images of a list, and its events are the answer.

The load belongs to the server and not to the client: it goes on where the client leaves, and ends
with the server. The child is `ociproxy load -`, whose memory goes back to the system at its end.

Tests: tests/serve/admin/test_load.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ociproxy import log
from ociproxy.config.reading import decode
from ociproxy.errors import Busy, ConfigError, NameInvalid, shorten
from ociproxy.load.imagelist import ImageListInvalid, parse_list
from ociproxy.metrics.counters import CHILDREN, inherited
from ociproxy.oci.platform import Platform
from ociproxy.serve.errors import SERVER, LoadRefused, RequestInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multidict import MultiMapping

    from ociproxy.config.settings import Config
    from ociproxy.serve.housekeeping import MakeCommand

_AT_ONCE: Final = 2
"""Loads that clients began and that run: each has `load.jobs` images under way."""
_RETRY: Final = 30.0
"""Seconds after which the client of a further one may try again."""
_LIST: Final = 1024 * 1024
"""Bytes of a list: about ten thousand images."""
_BODY_TIME: Final = 30.0
"""Seconds that a client may take to send it."""
_PIECE: Final = 64 * 1024
"""Bytes of events that are passed on at once."""
_AHEAD: Final = 4
"""Such pieces that wait for a client; then the load waits until it takes one, or has left."""
_PULSE: Final = 10.0
"""Seconds without an event after which the client is told that the load runs."""
_END_TIME: Final = 0.8
"""Seconds that a load has to end in order while the server stops: less than the server itself."""
_AGAIN: Final = 75
"""Exit code of a load that was ended from outside: the client may run it again."""
_FLAGS: Final = ("referrers", "pin", "fail-fast")
_END: Final = b""


class Loads:
    """The loads that clients began. Belongs to one event loop."""

    def __init__(self, make_command: MakeCommand, config: Config) -> None:
        self._make_command = make_command
        self._running: set[_Load] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self.use(config)

    def use(self, config: Config) -> None:
        """For loads that begin from now on."""
        self._config = config

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises LoadRefused, RequestInvalid or Busy."""
        config = self._config
        if config.serve.offline:
            raise LoadRefused("this mirror is offline: it asks no upstream")
        _check_sender(request)
        options = _options(request.query)
        if self._stopped or len(self._running) >= _AT_ONCE:
            raise Busy(f"{_AT_ONCE} loads run already, or the server stops", retry_after=_RETRY)
        load = _Load()
        self._running.add(load)  # before the body: it is in memory
        try:
            body, media = await _body(request), request.content_type
            loop = asyncio.get_running_loop()
            images, images_count = await loop.run_in_executor(None, _checked, body, media)
        except BaseException:
            self._running.discard(load)
            raise
        command = self._make_command(config.store.path, config, ["load", "-", *options])
        log.event(logging.INFO, "load began", client=request.remote, images=images_count)
        task = asyncio.create_task(self._run(load, command, images))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await _stream(request, load)

    def stop(self) -> None:
        """Begin no load, and have those that run end in order. Returns at once."""
        self._stopped = True
        for load in self._running:
            load.end()

    async def close(self) -> None:
        """After `stop`: wait for the ends. A load that takes longer sees that its server has gone,
        and ends by itself; its client is told before."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_TIME)
        for load in self._running:
            load.give_up()

    async def _run(self, load: _Load, command: Sequence[str], images: bytes) -> None:
        try:
            code = await load.run(command, images)
        except OSError as exc:
            log.event(logging.WARNING, "load failed", reason=exc)
            code = _AGAIN
        except Exception as exc:  # noqa: BLE001 a bug: the client must not wait for the end
            log.failure("load failed", exc)
            code = 1
        finally:
            self._running.discard(load)
        code = code if 0 <= code < 128 else _AGAIN
        CHILDREN.add("load", "failed" if code else "ok")
        log.event(logging.INFO, "load ended", code=code)
        await load.tell_end(code)


class _Load:
    """One child process, and what it has printed for the client. Compared by identity."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = self._left = False
        self.code = _AGAIN
        """The exit code, once `pieces` have their end."""

    async def run(self, command: Sequence[str], images: bytes) -> int:
        """The exit code of the child, negative for a signal. Raises OSError where none starts."""
        loop = asyncio.get_running_loop()
        child = self._child = await loop.run_in_executor(None, _start, command)
        if self._ended:
            child.terminate()
        feeding = loop.run_in_executor(None, _feed, child, images)
        reader = asyncio.StreamReader(_PIECE)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), child.stdout
        )
        try:
            while piece := await reader.read(_PIECE):
                await self._put(piece)
        finally:
            transport.close()
        await feeding
        return await loop.run_in_executor(None, _wait, child)

    async def tell_end(self, code: int) -> None:
        if not self._left:
            self.code = code
            await self._put(_END)

    async def _put(self, piece: bytes) -> None:
        if not self._left:
            await self.pieces.put(piece)

    def leave(self) -> None:
        """The client has gone: what the child prints is dropped."""
        self._left = True
        while not self.pieces.empty():
            self.pieces.get_nowait()

    def give_up(self) -> None:
        """Have the client told that the load is over for it."""
        self.leave()
        self.pieces.put_nowait(_END)

    def end(self) -> None:
        self._ended = True
        if self._child is not None:
            self._child.terminate()


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 no shell; words of this program
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=inherited()
    )


def _feed(child: subprocess.Popen[bytes], images: bytes) -> None:
    """The list, and a zero byte at its end; the pipe stays open, for its end ends the child."""
    assert child.stdin is not None  # noqa: S101 asked for in _start
    with suppress(OSError):  # the child has ended: its exit code says why
        child.stdin.write(images + b"\0")
        child.stdin.flush()


def _wait(child: subprocess.Popen[bytes]) -> int:
    code = child.wait()
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
    return code


async def _stream(request: web.BaseRequest, load: _Load) -> web.StreamResponse:
    headers = {
        "Server": SERVER,
        "Content-Type": "application/x-ndjson",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",  # a proxy such as nginx would keep the events for later
    }
    response = web.StreamResponse(headers=headers)
    whole_line = True
    try:
        with suppress(ConnectionError):
            await response.prepare(request)
            while True:
                try:
                    piece = await asyncio.wait_for(load.pieces.get(), _PULSE)
                except TimeoutError:
                    if whole_line:
                        await response.write(b'{"event": "running"}\n')
                    continue
                if piece == _END:
                    break
                await response.write(piece)
                whole_line = piece.endswith(b"\n")
            last = json.dumps({"event": "exit", "exitCode": load.code}) + "\n"
            await response.write((last if whole_line else f"\n{last}").encode())
            await response.write_eof()
    finally:
        load.leave()
    return response


def _check_sender(request: web.BaseRequest) -> None:
    """A page of another site may make a browser send its reader's password along, or reach this
    machine's loopback. Raises LoadRefused or RequestInvalid."""
    origin, host = request.headers.get("Origin"), request.host
    own = origin in (None, f"http://{host}", f"https://{host}")
    if not own or request.headers.get("Sec-Fetch-Site") not in (None, "none", "same-origin"):
        raise LoadRefused("a page of another site may not begin a load")
    if request.content_type == "application/json":  # a browser asks before it sends that elsewhere
        return
    if request.content_type != "text/plain":
        reason = "send application/json, an array of lines, or text/plain, a list as load reads it"
        raise RequestInvalid(reason, status=415)
    if "X-Requested-With" not in request.headers:
        reason = "text/plain needs a header X-Requested-With, with any value: no page can send that"
        raise RequestInvalid(reason, status=400)


def _options(query: MultiMapping[str]) -> list[str]:
    """The options of the command. Raises RequestInvalid."""
    words: list[str] = []
    for name, value in query.items():
        if name in _FLAGS and value in ("", "true"):
            words.append(f"--{name}")
        elif name == "platform" and value == "all":
            words.append("--all-platforms")
        elif name == "platform":
            try:
                words += ["--platform", str(Platform.parse(value))]
            except NameInvalid as exc:
                raise RequestInvalid(str(exc), status=400) from exc
        else:
            known = ", ".join(("platform=OS/ARCH", *_FLAGS))
            reason = f"the query has {shorten(f'{name}={value}')}; there are {known}"
            raise RequestInvalid(reason, status=400)
    if "--all-platforms" in words and "--platform" in words:
        raise RequestInvalid("platform=all excludes other platforms", status=400)
    return words


async def _body(request: web.BaseRequest) -> bytes:
    """Raises RequestInvalid."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIME):
            while piece := await request.content.readany():
                body += piece
                if len(body) > _LIST:
                    raise RequestInvalid(f"a list of more than {_LIST} bytes", status=413)
    except TimeoutError as exc:
        raise RequestInvalid(f"no whole list within {_BODY_TIME:g} s", status=408) from exc
    except (web.RequestPayloadError, HttpProcessingError) as exc:
        raise RequestInvalid("the body is cut, or not HTTP", status=400) from exc
    return bytes(body)


def _checked(body: bytes, media: str) -> tuple[bytes, int]:
    """The list, and how many images it names. Raises RequestInvalid with every bad line."""
    try:
        text = decode(body, "list", "utf-8-sig")
        if media == "application/json":
            text = "\n".join(_lines(text))
        if "\0" in text:
            raise ConfigError("a zero byte", file="list")
        wanted, problems = parse_list(text, "list")
        if problems:
            raise ImageListInvalid(problems)
        if not wanted:
            raise ConfigError("names no image", file="list")
    except ConfigError as exc:
        raise RequestInvalid(str(exc), status=400) from exc
    return text.encode(), len(wanted)


def _lines(text: str) -> list[str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError("not JSON", file="list") from exc
    lines: list[str] = []
    for line in document if isinstance(document, list) else [None]:
        if not isinstance(line, str) or len(line.splitlines()) > 1:
            number = len(lines) + 1
            raise ConfigError("not an array of lines, as strings", file="list", line=number)
        lines.append(line)
    return lines
