"""Several processes behind one port: forked from one that keeps their number and passes signals on.

They share the listening socket and the store; a download in one is followed by the others
through `pulls/`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from threading import Thread
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy import log

if TYPE_CHECKING:
    import socket

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_RESTART_PAUSE: Final = 1.0
"""Seconds before a worker that died is replaced: one that cannot start must not spin."""
_END_MARGIN: Final = 30.0
"""Seconds beyond the grace period after which a worker that has not ended is killed."""


class Work(Protocol):
    """What one process does; `again` in one that replaces a process that died."""

    def __call__(self, *, again: bool) -> None: ...


def run_workers(count: int, work: Work, *, listener: socket.socket, grace: float) -> None:
    """Run `work` in `count` processes until SIGTERM or SIGINT; returns when all have ended.

    The listener is closed as soon as they are told to: connections that nobody will accept are
    refused then, so that their clients go elsewhere.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # Written to by nobody: that it is closed is how a worker learns that this process was killed.
    lifeline = os.pipe()
    children = {_fork(work, lifeline, grace, again=False) for _ in range(count)}
    stopping = False
    deadline = float("inf")
    while children:
        info = signal.sigtimedwait(_SIGNALS, 1.0)
        if info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT):
            stopping, deadline = True, min(deadline, time.monotonic() + grace + _END_MARGIN)
            listener.close()
            _tell(children, signal.SIGTERM)
        elif info is not None and info.si_signo == signal.SIGHUP:
            _tell(children, signal.SIGHUP)
        if time.monotonic() > deadline:
            _tell(children, signal.SIGKILL)
        for pid, status in _ended(children):
            children.discard(pid)
            if not stopping:
                log.event(logging.ERROR, "worker died", pid=pid, status=status)
                time.sleep(_RESTART_PAUSE)
                children.add(_fork(work, lifeline, grace, again=True))


def _fork(work: Work, lifeline: tuple[int, int], grace: float, *, again: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        reading, writing = lifeline
        os.close(writing)
        watch = Thread(target=_end_with_parent, args=(reading, grace), name="lifeline", daemon=True)
        watch.start()
        work(again=again)
        status = 0
    except BaseException as exc:  # noqa: BLE001 a process's end: reported in its status
        log.failure("worker failed", exc)
    finally:
        os._exit(status)


def _end_with_parent(lifeline: int, grace: float) -> None:
    """Else the port would stay taken, by processes that no signal reaches any more."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace + _END_MARGIN)
    os._exit(1)


def _tell(children: set[int], number: signal.Signals) -> None:
    for pid in children:
        os.kill(pid, number)


def _ended(children: set[int]) -> list[tuple[int, int]]:
    ended = []
    for pid in children:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended
