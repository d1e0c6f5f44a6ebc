"""Several processes behind one port.

The main process forks the workers, replaces those that die, and passes signals on. The workers
share the listening socket and the store; a worker follows a download of another through `pulls/`.

Tests: tests/serve/test_shutdown.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from threading import Thread
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy import log
from ociproxy.metrics.counters import WORKERS_DIED
from ociproxy.serve.ending import MARGIN

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Sequence

    from ociproxy.serve.supervisor import Supervisor

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_LOOK: Final = 1.0
"""Seconds between two looks at the workers, at most."""
_RESTART_PAUSE: Final = 1.0
"""Seconds before a dead worker is replaced: workers that cannot start must not spin."""
_KILL_AFTER: Final = MARGIN + 0.6
"""Seconds beyond `serve.shutdown_grace` after which a worker that still runs is killed. By then it
has ended itself, unless its event loop hangs."""


class Work(Protocol):
    """What one process does; `again` is True in one that replaces a dead one."""

    def __call__(self, *, again: bool) -> None: ...


def run_workers(
    works: Sequence[Work],
    supervisor: Supervisor,
    *,
    listeners: Sequence[socket.socket],
    grace: float,
) -> None:
    """Run each of `works` in a process until SIGTERM or SIGINT; returns when all have ended.

    The main process closes the listeners when it tells the workers to stop: new connections are
    then refused, and their clients go elsewhere.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # A pipe that is never written to: a worker reads its end when the main process was killed.
    lifeline = os.pipe()
    children = {_fork(work, lifeline, grace, again=False): work for work in works}
    stopping = False
    deadline = float("inf")
    pause = min(_LOOK, supervisor.interval or _LOOK)
    while children:
        supervisor.alive()
        left = deadline - time.monotonic()
        info = signal.sigtimedwait(_SIGNALS, min(pause, max(0.0, left)) if left > 0 else 0.1)
        if info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT):
            stopping, deadline = True, min(deadline, time.monotonic() + grace + _KILL_AFTER)
            supervisor.stopping()
            for listener in listeners:
                listener.close()
            _tell(children, signal.SIGTERM)
        elif info is not None and info.si_signo == signal.SIGHUP:
            _tell(children, signal.SIGHUP)
        if time.monotonic() > deadline:
            _tell(children, signal.SIGKILL)
        for pid, status in _ended(children):
            work = children.pop(pid)
            if not stopping:
                WORKERS_DIED.add()
                log.event(logging.ERROR, "worker died", pid=pid, status=status)
                time.sleep(_RESTART_PAUSE)
                supervisor.alive()
                children[_fork(work, lifeline, grace, again=True)] = work


def _fork(work: Work, lifeline: tuple[int, int], grace: float, *, again: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # The signals stay blocked until the worker handles them; a signal that comes before waits.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        reading, writing = lifeline
        os.close(writing)
        watch = Thread(target=_end_with_parent, args=(reading, grace), name="lifeline", daemon=True)
        watch.start()
        work(again=again)
        status = 0
    except BaseException as exc:  # noqa: BLE001 a process's end: reported in its status
        log.failure("worker failed", exc)
    finally:
        log.flush()
        os._exit(status)


def _end_with_parent(lifeline: int, grace: float) -> None:
    """Stop when the main process is gone: the port would stay taken by workers that no signal
    reaches."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace + _KILL_AFTER)
    log.flush()
    os._exit(1)


def _tell(children: Iterable[int], number: signal.Signals) -> None:
    for pid in children:
        os.kill(pid, number)


def _ended(children: Iterable[int]) -> list[tuple[int, int]]:
    ended = []
    for pid in children:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended
