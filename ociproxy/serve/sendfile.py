"""Threads that send files, so that the server's event loop answers other clients meanwhile.

One `sendfile` call takes about a millisecond to fill a socket's buffer, and as long as the disk
takes where the file is not in the page cache. Several threads use several cores. Each runs an event
loop, so a slow client holds up no other client; a slow disk holds up all files of its thread.
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
"""One for each core; with more than four the network is the limit, not the processor."""
_STOP_TIME: Final = 1.0
"""Seconds that `close` waits for each thread: one may hang in a dead disk's read."""


class Senders:
    """Belongs to one event loop; `close` ends the threads."""

    def __init__(self) -> None:
        self._senders = [_Sender() for _ in range(_THREADS)]

    async def send(
        self, transport: asyncio.Transport, file: BinaryIO, position: int, size: int
    ) -> int:
        """Send `size` bytes of a file, from `position` on, over a transport without TLS whose
        write buffer is empty. Returns the bytes sent: fewer where the file is shorter.

        Raises OSError, and SendfileNotAvailableError where not one byte could be sent.
        """
        sender = min(self._senders, key=lambda each: each.running)
        # Duplicates: this loop may close socket and file while the thread uses them.
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
            # Shielded: a job cancelled before it begins would never close its duplicates.
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
        """Cut short what is still being sent."""
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
    """Returns its errors: asyncio would log one that is raised after the caller has left."""
    with client, file:
        try:
            loop = asyncio.get_running_loop()
            return await loop.sock_sendfile(client, file, position, size, fallback=False)
        except (OSError, RuntimeError) as exc:
            return exc


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client left before
        client.shutdown(socket.SHUT_RDWR)
