"""Threads that send files.

A `sendfile` takes about a millisecond for what a socket's buffer holds, and as long as the disk
takes where a file is not in the page cache. The server's event loop answers others meanwhile, and
blobs are sent with more than one core. Each thread runs an event loop of its own, whose
`sock_sendfile` waits for slow clients: any number of them costs a thread nothing. A slow disk does
hold up what else the same thread sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import BinaryIO

_THREADS: Final = min(len(os.sched_getaffinity(0)), 4)
_STOP_TIME: Final = 1.0
"""Seconds for a thread to end; one that waits for a dead disk is left to the process's end."""


class Senders:
    """Belongs to one event loop; `close` ends the threads."""

    def __init__(self) -> None:
        self._senders = [_Sender() for _ in range(_THREADS)]

    async def send(
        self, transport: asyncio.Transport, file: BinaryIO, position: int, size: int
    ) -> int:
        """Send a part of a file over a transport without TLS, to which nothing waits to be written.
        How many bytes it was: less than `size` where the file is shorter.

        Raises OSError; SendfileNotAvailableError where it was the first byte that failed.
        """
        sender = min(self._senders, key=lambda each: each.running)
        # Both may be closed, and their numbers given to others, before a thread hears of it.
        client: socket.socket = transport.get_extra_info("socket").dup()
        try:
            copy = os.fdopen(os.dup(file.fileno()), "rb", 0)
        except BaseException:
            client.close()
            raise
        job = asyncio.run_coroutine_threadsafe(_send(client, copy, position, size), sender.loop)
        was_reading = transport.is_reading()
        transport.pause_reading()
        sender.running += 1
        try:
            # Not cancelled with the waiting: what had not begun then would never close its files.
            sent = await asyncio.shield(asyncio.wrap_future(job))
        except asyncio.CancelledError:
            sender.loop.call_soon_threadsafe(_hang_up, client)
            raise
        finally:
            sender.running -= 1
            if was_reading:
                transport.resume_reading()
        if isinstance(sent, Exception):
            raise sent
        return sent

    def close(self) -> None:
        """What is still being sent is cut short."""
        for sender in self._senders:
            sender.stop()


class _Sender:
    def __init__(self) -> None:
        self.running = 0
        self.loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._stopped.wait())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(_STOP_TIME)


async def _send(
    client: socket.socket, file: BinaryIO, position: int, size: int
) -> int | OSError | RuntimeError:
    """Returns its errors: raised, one that nobody waits for any more would be logged."""
    with client, file:
        try:
            loop = asyncio.get_running_loop()
            return await loop.sock_sendfile(client, file, position, size, fallback=False)
        except (OSError, RuntimeError) as exc:
            return exc


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        client.shutdown(socket.SHUT_RDWR)
