"""Maintenance of the store beside the server: commands of this program, as child processes.

What a command needs of memory goes back to the system when it ends, and the event loop neither
walks the store nor waits for it. Each job has a thread in each server process. Of all processes
that serve one store, the one whose thread has the claim runs the job; where it ends or was stopped,
another takes over. A child ends with its server: it reads a pipe that nothing writes to, whose end
it sees even where the server was killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Final, Protocol

from ociproxy import log
from ociproxy.errors import StoreError
from ociproxy.metrics.counters import CHILDREN, inherited
from ociproxy.store.removal import is_read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store

    MakeCommand = Callable[[Path, Config, Sequence[str]], list[str]]

LOOK: Final = 0.5
"""Seconds between two looks at whether a job is due, or whether its claim has become free."""
_BUSY: Final = 75
"""Exit code of a command whose work another process does at the moment."""
_BUSY_PAUSE: Final = 5.0
"""Seconds until it is tried again."""
_FAILURES: Final = (1, 2, 4, 130)
"""Exit codes that say why nothing was done: a bug, the configuration, the store, a signal."""
_FAILED_PAUSE: Final = 60.0
"""Seconds until what failed is tried again."""
_END_TIME: Final = 5.0
"""Seconds that a child has to end after SIGTERM; then it is killed."""
_LINE: Final = 64 * 1024
"""Bytes of an event: a longer line is no event."""


class Job(Protocol):
    """One kind of maintenance. Its methods are called by one thread, but `use` by any."""

    name: str
    """Of the claim, too: a word."""

    def use(self, config: Config) -> None:
        """From now on this configuration holds."""

    def due(self) -> Sequence[str] | None:
        """The words of the command to run now; None while there is nothing to do. May read files.
        Raises StoreError."""

    def heard(self, event: dict[str, Any]) -> None:
        """The command printed this event (`--json`)."""

    def ended(self, code: int) -> None:
        """The command ended with this exit code, which is negative for a signal. Raises
        StoreError."""


class Housekeeper:
    """The thread of one job in one server process. `start` it, then `stop` it."""

    def __init__(self, store: Store, job: Job, make_command: MakeCommand, config: Config) -> None:
        """`make_command` makes the command line of a child that works on the store at a path, out
        of the words of a command, such as `prune --unreferenced`."""
        self._store = store
        self._job = job
        self._make_command = make_command
        self._config = config
        self._claim = store.removals.claim(f"housekeeping-{job.name}")
        self._ending = Event()
        self._lock = Lock()
        """Guards `_child`, so that none starts after `stop`."""
        self._child: subprocess.Popen[bytes] | None = None
        self._error = ""
        self._thread = Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def use(self, config: Config) -> None:
        """A new configuration holds, for a child that runs already from its next run on."""
        self._config = config
        self._job.use(config)

    def stop(self) -> None:
        """Begin nothing more, and end the running child. Blocks until it has ended, for twice
        `_END_TIME` at most."""
        self._ending.set()
        with self._lock:
            if self._child is not None:
                self._child.terminate()
        self._thread.join(_END_TIME)
        with self._lock:
            if self._child is not None:
                self._child.kill()
        self._thread.join(_END_TIME)

    def _run(self) -> None:
        name = self._job.name
        claim = self._claim
        try:
            while not self._ending.is_set():
                try:
                    if claim.take():
                        self._keep_house()
                except StoreError as exc:
                    if is_read_only(exc.__cause__):  # as an offline mirror's store may be
                        log.event(logging.INFO, "no housekeeping", job=name, reason=exc)
                        return
                    self._failed(exc)
                self._ending.wait(LOOK)
        finally:
            claim.close()

    def _keep_house(self) -> None:
        """For as long as this process has the claim. Raises StoreError where that cannot be
        seen."""
        while not self._ending.is_set() and self._claim.is_held():
            try:
                words = self._job.due()
                if words is None:
                    self._ending.wait(LOOK)
                    continue
                # It may have been stopped since it asked.
                if self._claim.is_held():
                    with self._claim.working():
                        self._run_child(words)
            except StoreError as exc:
                self._failed(exc)
            except Exception as exc:  # noqa: BLE001 a thread's loop: the next run may go well
                log.failure("housekeeping failed", exc, job=self._job.name)
                with self._claim.working():
                    self._ending.wait(_FAILED_PAUSE)

    def _run_child(self, words: Sequence[str]) -> None:
        name, began = self._job.name, time.monotonic()
        self._error = ""
        child = self._start_child(words)
        if child is None:
            return
        try:
            assert child.stdout is not None  # noqa: S101 asked for in _start_child
            while line := child.stdout.readline(_LINE):
                self._hear(line)
            code = child.wait()
        finally:
            self._end_child(child)
        seconds = time.monotonic() - began
        log.event(logging.DEBUG, "housekeeping ended", job=name, code=code, seconds=seconds)
        if self._ending.is_set():
            return
        CHILDREN.add(name, "ok" if code == 0 else "busy" if code == _BUSY else "failed")
        self._job.ended(code)
        if code == _BUSY:
            self._ending.wait(_BUSY_PAUSE)
        elif code < 0 or code in _FAILURES:
            self._failed(self._error or f"exit code {code}")

    def _failed(self, reason: object) -> None:
        log.event(logging.WARNING, "housekeeping failed", job=self._job.name, reason=reason)
        with self._claim.working():
            self._ending.wait(_FAILED_PAUSE)

    def _start_child(self, words: Sequence[str]) -> subprocess.Popen[bytes] | None:
        """None where the server ends."""
        with self._lock:
            if self._ending.is_set():
                return None
            try:
                self._child = subprocess.Popen(  # noqa: S603 no shell; words of this program
                    [*_low_priority(), *self._make_command(self._store.root, self._config, words)],
                    stdin=subprocess.PIPE,  # never written to: see the module's docstring
                    stdout=subprocess.PIPE,
                    pass_fds=inherited(),
                )
            except OSError as exc:
                reason = f"no process: {(exc.strerror or str(exc)).lower()}"
                raise StoreError(self._store.root, reason) from exc
            return self._child

    def _end_child(self, child: subprocess.Popen[bytes]) -> None:
        """It has ended, or something went wrong here: then its pipes tell it to end."""
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_END_TIME)
        with self._lock:
            self._child = None

    def _hear(self, line: bytes) -> None:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                if event.get("event") == "error":
                    self._error = str(event.get("reason"))
                self._job.heard(event)


def _low_priority() -> list[str]:
    """Clients go first, at the processor and at the disk. Not `idle` at the disk: publishers wait
    while a prune removes, which then must not wait for all other processes."""
    program = shutil.which("ionice")
    return [] if program is None else [program, "-t", "-c", "2", "-n", "7"]
