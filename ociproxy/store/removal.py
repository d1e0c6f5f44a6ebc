"""Publishing and removing, kept apart over all processes that share a store.

A process *publishes* under a shared lock: it looks that an image's blobs are there, and writes the
manifests and tags that need them; its threads share that lock. One process at a time *removes*, in
short batches under an exclusive lock: it looks that a file is neither used nor needed, and moves it
out of the store. So no image is published whose blobs are being removed.

A process that waits for its turn to remove holds a second lock, the gate, at which new publishers
wait: else a busy server would never let it in.

A process that was stopped while it removes would hold up every publisher. It does not touch its
locks any more. A publisher then takes away the folder into which it moves what it removes, and puts
new locks in the place of the old ones: once it goes on, each of its moves fails.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, local
from typing import TYPE_CHECKING, Final, Self

from ociproxy import log
from ociproxy.errors import Busy, StoreError
from ociproxy.store.claim import LOCKS_MODE, Claim
from ociproxy.store.files import Silence, heartbeat, is_at, store_errors, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STOPPED: Final = 5.0
"""Seconds. A remover touches its locks once a second; one that did not for so long was stopped."""
_PATIENCE: Final = 30.0
"""Seconds to wait for a lock: a batch takes less than one, on a disk that works."""
_TURN: Final = 2.0
"""Seconds for which a remover keeps new publishers waiting until the running ones have ended."""
_LONGEST_TURN: Final = 8.0
"""Its turns double up to this: publishers take long on a slow disk. Clients wait 20 s at most."""
_PAUSE: Final = 0.5
"""Seconds between two turns of a remover."""
_INTERVAL: Final = 0.003
"""Seconds between two tries: flock itself cannot wait with a limit."""
_JOINED: Final = 0.1
"""Seconds for which further publishers share a lock: those that come later wait at the gate."""
_LOOK: Final = 0.1
"""Seconds between two looks at whether the process that has the claim works."""
_GATE: Final = "gate"
_LOCK: Final = "publishing"
_REMOVER: Final = "remover"
_REMOVED: Final = ".removed-"


@dataclass(slots=True)
class _Hold:
    """The shared lock of publishers of this process, since when (monotonic seconds)."""

    lock: int
    since: float
    users: int = 1


class Removals:
    """The locks of one store, in `locks/`; `staging` is its `pulls/`. Thread-safe."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self._folder = folder
        self._staging = staging
        self.spare = folder / "spare"
        """An empty folder, while no process removes."""
        self._held = local()
        self._counting = Lock()
        self._last: _Hold | None = None

    @contextmanager
    def kept_off(self) -> Iterator[None]:
        """Publish: inside, nothing is removed. A thread may enter it again inside. Blocks. Where
        this process may not write, it holds nothing. Raises StoreError."""
        if getattr(self._held, "hold", None) is not None:
            yield
            return
        try:
            hold = self._held.hold = self._hold()
        except StoreError as exc:
            if not is_read_only(exc.__cause__):
                raise
            yield
            return
        try:
            yield
        finally:
            self._held.hold = None
            self._let_go(hold)

    def _hold(self) -> _Hold:
        """The lock that another thread took just now, else one of its own. Blocks."""
        with self._counting:
            last = self._last
            if last and last.users and time.monotonic() - last.since <= _JOINED:
                last.users += 1
                return last
        gate = self._await(_GATE)
        try:
            self._last = hold = _Hold(self._await(_LOCK), time.monotonic())
            return hold
        finally:
            os.close(gate)

    def prolong(self) -> Callable[[], None]:
        """Inside `kept_off`: nothing is removed until the function that is returned was called, by
        any thread."""
        hold: _Hold | None = getattr(self._held, "hold", None)
        if hold is None:
            return lambda: None
        with self._counting:
            hold.users += 1
        return partial(self._let_go, hold)

    def _let_go(self, hold: _Hold) -> None:
        with self._counting:
            hold.users -= 1
            if hold.users:
                return
        os.close(hold.lock)

    def claim(self, name: str) -> Claim:
        """To do the work of this name in one process at a time."""
        # Opened to read, for an open to write keeps an operator from mounting the disk read-only.
        return Claim(self._folder / name, self._open)

    def remover(self) -> Remover:
        """Become the one process that removes; close it. Raises Busy where another one is, or
        StoreError."""
        claim = self._own_removing()
        try:
            with store_errors(self._staging):
                for left in self._staging.glob(f"{_REMOVED}*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                removed = self._make_folder()
                lock = os.open(removed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            _close(claim)
            raise
        try_lock(lock)  # else it would be swept with what killed processes left
        return Remover(self, (claim, lock), removed)

    def _make_folder(self) -> Path:
        """For what is removed, under a name that no process had before. Raises OSError."""
        folder = self._staging / f"{_REMOVED}{secrets.token_hex(8)}"
        try:
            self.spare.rename(folder)  # a disk that is full has no room for a folder
        except OSError:
            folder.mkdir(mode=0o700)
        return folder

    def _own_removing(self) -> int:
        """The claim, locked. If another process holds it, wait: a touch means that it works (Busy),
        a long silence that it was stopped. Raises Busy or StoreError."""
        path = self._folder / _REMOVER
        while True:
            with store_errors(path):
                file = self._open(_REMOVER)
                touched = os.fstat(file).st_mtime_ns
            silence = Silence(path, STOPPED)
            claimed = False
            try:
                while is_at(file, path):
                    claimed = try_lock(file) and is_at(file, path)
                    if claimed:
                        heartbeat.start(file)
                        return file
                    if os.fstat(file).st_mtime_ns != touched:
                        raise Busy("another prune is running on this store")
                    if silence.is_long():
                        self._depose(file, path)
                    time.sleep(_LOOK)
            finally:
                if not claimed:
                    os.close(file)

    def _await(self, name: str) -> int:
        """A shared lock, once no remover has it."""
        path, limit = f"{self._folder}{os.sep}{name}", time.monotonic() + _PATIENCE
        silence = Silence(path, STOPPED)
        while time.monotonic() < limit:
            with store_errors(path):
                file = self._open(name)
            locked = False
            try:
                while time.monotonic() < limit:
                    locked = try_lock(file, fcntl.LOCK_SH) and is_at(file, path)
                    if locked:
                        return file
                    if not is_at(file, path):
                        break
                    if silence.is_long():
                        self._depose(file, Path(path))
                    time.sleep(_INTERVAL)
            finally:
                if not locked:
                    os.close(file)
        raise StoreError(Path(path), f"no turn to publish within {_PATIENCE:g} s")

    def _exclude(self) -> tuple[int, int]:
        """The gate and the lock, once no publisher has them. Raises Busy."""
        limit, turn = time.monotonic() + _PATIENCE, _TURN
        while time.monotonic() < limit:
            if (gate := self._try(_GATE, turn)) is not None:
                if (lock := self._try(_LOCK, turn)) is not None:
                    return gate, lock
                _close(gate)
                turn = min(2 * turn, _LONGEST_TURN)
            time.sleep(_PAUSE)
        raise Busy(f"images were being published all the time for {_PATIENCE:g} s")

    def _try(self, name: str, seconds: float) -> int | None:
        path, limit = self._folder / name, time.monotonic() + seconds
        with store_errors(path):
            file = self._open(name)
        locked = False
        try:
            while time.monotonic() < limit and is_at(file, path):
                locked = try_lock(file) and is_at(file, path)
                if locked:
                    heartbeat.start(file)
                    with store_errors(path):
                        os.utime(file)  # a publisher counts the silence from here
                    return file
                time.sleep(_INTERVAL)
        finally:
            if not locked:
                os.close(file)
        return None

    def _open(self, name: str) -> int:
        path = f"{self._folder}{os.sep}{name}"
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._folder.mkdir(mode=LOCKS_MODE, exist_ok=True)
            with suppress(OSError):
                self.spare.mkdir(mode=0o700)
            file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # A command that root runs must not keep the server from its locks.
        owner = self._folder.parent.stat()
        with suppress(OSError):
            os.chown(self._folder, owner.st_uid, owner.st_gid)
            os.chown(self.spare, owner.st_uid, owner.st_gid)
        with suppress(PermissionError):
            os.fchown(file, owner.st_uid, owner.st_gid)
        return file

    def _depose(self, file: int, path: Path) -> None:
        """Take away the power of a stopped remover, which has this lock. Its folder goes first:
        from then on it removes nothing, so other processes may have its locks."""
        deposing = self._open("deposing")
        try:
            # Another publisher does it, or has done it.
            if not try_lock(deposing) or not is_at(file, path):
                return
            for folder in self._staging.glob(f"{_REMOVED}*"):
                deposed = self._staging / f".deposed-{secrets.token_hex(8)}"
                with store_errors(folder), suppress(FileNotFoundError):
                    folder.rename(deposed)
                shutil.rmtree(deposed, ignore_errors=True)
            # The publishers that it waits for have the lock, if it has the gate only.
            if not self._is_shared(_LOCK):
                (self._folder / _LOCK).unlink(missing_ok=True)
            for name in (_GATE, _REMOVER):
                (self._folder / name).unlink(missing_ok=True)
            log.event(logging.WARNING, "remover stopped", seconds=STOPPED)
        finally:
            os.close(deposing)

    def _is_shared(self, name: str) -> bool:
        file = self._open(name)
        try:
            return try_lock(file, fcntl.LOCK_SH)
        finally:
            os.close(file)


class Remover:
    """The right of one process to remove. Belongs to one thread; use it as a context manager."""

    def __init__(self, removals: Removals, locks: tuple[int, int], folder: Path) -> None:
        self._removals = removals
        self._locks = locks
        self.folder = folder
        """What is moved out of the store; it is gone once another process has taken the turn."""
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # deposed
            self._empty()
            self.folder.rename(self._removals.spare)
        shutil.rmtree(self.folder, ignore_errors=True)
        for lock in self._locks:
            _close(lock)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Inside, no process publishes: look what may go, `take` it, and leave soon. What was taken
        is deleted after that. Raises Busy or StoreError."""
        gate, lock = self._removals._exclude()
        try:
            yield
        finally:
            _close(lock)
            _close(gate)
        with suppress(OSError):  # deposed just now
            self._empty()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)

    def take(self, path: Path) -> bool:
        """Move a file out of the store; False where it has gone already. Call it in a batch. Raises
        Busy where this process was stopped for so long that it lost its turn, or StoreError."""
        self._count += 1
        with store_errors(path):
            try:
                path.replace(self.folder / str(self._count))
                return True
            except FileNotFoundError:
                if self.folder.is_dir():
                    return False
                raise Busy("this process was stopped while it removed, and lost its turn") from None


def is_read_only(cause: BaseException | None) -> bool:
    """Whether an operation failed since this process may not write to the store."""
    return isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES)


def _close(file: int) -> None:
    heartbeat.stop(file)
    os.close(file)
