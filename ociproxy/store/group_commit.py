"""Group commit: manifests and records become visible, and survive a power cut, many at once.

A caller stages the files that it publishes together into a `Commit`. One thread takes all commits
that wait, and does for all of them

1. the flush of their files, and of the names of blobs;
2. the renames of the manifests, then the flush of their folders;
3. the renames of the records, then the flush of their folders.

So after a power cut, too, each visible file has its bytes, and no record leads to a manifest that
went. What is staged is found at once, but by this process only: in `pending`, until it is renamed.

A client is answered when a commit is handed over; one that tells an operator of success waits. A
file that the disk does not take is never renamed, nor what was staged with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Final, TypeVar

from ociproxy import log
from ociproxy.errors import StoreError
from ociproxy.store.files import fsync_directory, publish, store_error, store_errors
from ociproxy.store.staging import Pending, stage_as_text, write_all

T = TypeVar("T", bound=Hashable)

_MOST_FILES: Final = 256
"""Staged files that wait. Each is open, and its bytes are in memory."""
_MOST_BYTES: Final = 32 * 1024 * 1024
"""Their bytes: eight of the largest manifests."""
_MOST_OF_ONE: Final = 128
"""Staged files of one commit. Beyond, those before are published first."""
PATIENCE: Final = 300.0
"""Seconds to wait for the disk: more than a flush takes behind gigabytes of a slow disk."""
_LINGER: Final = 0.3
"""Seconds that the names of blobs wait for further ones, or for a commit that flushes them too."""
_GATHER: Final = 0.1
"""Seconds that commits gather further ones while no caller waits: each group flushes the same
folders."""
_FLUSHERS: Final = 8
"""Threads that flush. One fsync waits for the file system's journal, which serves all that come
meanwhile: 96 files took 130 ms one by one, 8 ms by eight threads (ext4). `syncfs` waits for all
that any program has written."""


@dataclass(slots=True)
class _Staged:
    file: int
    path: str
    target: str
    size: int
    value: object


class Commit:
    """What one caller publishes together. Belongs to one thread."""

    gathers = False
    """Whether it may wait a moment for others until a caller waits."""

    def __init__(self, group: GroupCommit, prolong: Callable[[], Callable[[], None]]) -> None:
        """`prolong` keeps other processes from removing anything, until what it returns is
        called."""
        self.manifests: list[_Staged] = []
        self.records: list[_Staged] = []
        self.failure: StoreError | None = None
        self.release: Callable[[], None] = lambda: None
        """Called when all has become visible, or cannot."""
        self._prolong = prolong
        self._group = group
        self._done: Future[None] | None = None

    @property
    def staged(self) -> list[_Staged]:
        return [*self.manifests, *self.records]

    def __contains__(self, target: str) -> bool:
        return any(each.target == target for each in self.staged)

    def stage(self, target: str, data: bytes, value: object, *, record: bool) -> None:
        """Write a file that gets its name later; `value` is what `pending` shows till then. Raises
        StoreError."""
        if len(self.manifests) + len(self.records) >= _MOST_OF_ONE:
            self.wait()
            self.manifests, self.records = [], []
            self._done = None
        with store_errors(target):
            file, path = stage_as_text(self._group.folder, mode=0o644)
            try:
                write_all(file, data)
                with suppress(OSError):
                    # The kernel begins to write: then one flush of the journal serves many files.
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            except BaseException:
                os.close(file)
                with suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
                raise
        staged = _Staged(file, path, target, len(data), value)
        (self.records if record else self.manifests).append(staged)
        self._group.pending[target] = value

    def hand_over(self) -> Future[None]:
        """Publish soon; `wait` tells when that is done."""
        if self._done is None:
            self.release = self._prolong()
            self._done = self._group.submit(self)
        return self._done

    def wait(self, seconds: float = PATIENCE) -> None:
        """Return when all of this, and all that was visible before, survives a power cut. Raises
        StoreError."""
        done = self.hand_over()
        if not done.done():
            self._group.hurry()
        try:
            done.result(seconds)
        except NotYet as exc:
            reason = f"the disk has not written for {PATIENCE:g} s"
            raise StoreError(self._group.staging, reason) from exc

    def discard(self) -> None:
        """Drop what is staged and not handed over yet."""
        if self._done is not None:
            return  # the group has it: it ends there, and its files are closed once
        for each in self.staged:
            _drop(each)
            self._group.forget(each)
        self.manifests, self.records = [], []


class GroupCommit:
    """Of one store in one process. Thread-safe. Its thread runs while there is something to do, and
    the interpreter waits for it at the end."""

    def __init__(self, staging: Path, blobs: Path, manifests: Sequence[Path]) -> None:
        self.staging = staging
        self.folder = str(staging)
        self.made: Callable[[list[tuple[str, int]]], None] = lambda _: None
        """Called with the path and the size of each manifest that was not there before."""
        self.pending = Pending()
        self._blobs = blobs
        self._folders = manifests
        self._changed = Condition()
        self._waiting: list[tuple[Commit, Future[None]]] = []
        self._urgent = False  # a caller waits for one of them
        self._names_changed = False
        self._files = 0
        self._bytes = 0
        self._running = False
        self._flushers = ThreadPoolExecutor(_FLUSHERS, "group flush")

    def wait_for_room(self, seconds: float) -> None:
        """Wait while as much is staged as may be. Raises StoreError."""

        def has_room() -> bool:
            return self._files < _MOST_FILES and self._bytes < _MOST_BYTES

        with self._changed:
            if not self._changed.wait_for(has_room, seconds):
                raise StoreError(self.staging, f"the disk has not written for {seconds:g} s")

    def submit(self, commit: Commit) -> Future[None]:
        """The result comes when all that was staged, and the name of each blob, is durable."""
        done: Future[None] = Future()
        with self._changed:
            self._waiting.append((commit, done))
            self._urgent = self._urgent or not commit.gathers
            self._files += len(commit.manifests) + len(commit.records)
            self._bytes += sum(each.size for each in commit.staged)
            self._changed.notify_all()
        self._start()
        return done

    def hurry(self) -> None:
        """Gather no further commits: a caller waits."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()

    def keep_names(self) -> None:
        """Make the names of blobs durable soon."""
        with self._changed:
            self._names_changed = True
        self._start()

    def settle(self, seconds: float) -> bool:
        """Wait until what was handed over so far is durable, or was refused; False if that takes
        longer."""
        with self._changed:
            if not self._running:
                return True
        last = self.submit(Commit(self, lambda: lambda: None))
        with suppress(StoreError):
            try:
                last.result(seconds)
            except NotYet:
                return False
        return True

    def forget(self, staged: _Staged) -> None:
        """It has its name, or never gets it."""
        # Another commit may have staged the same name since.
        if self.pending.get(staged.target) is staged.value:
            self.pending.pop(staged.target, None)
        with suppress(OSError):  # it was flushed: what a network file system says now is old
            os.close(staged.file)

    def _start(self) -> None:
        with self._changed:
            if self._running:
                return
            self._running = True
        try:
            Thread(target=self._run, name="group commit").start()
        except RuntimeError:  # the interpreter ends, or the system starts no thread
            self._run()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._names_changed:
                    self._changed.wait_for(lambda: self._waiting, _LINGER)
                self._changed.wait_for(lambda: self._urgent or not self._waiting, _GATHER)
                batch, self._waiting, self._urgent = self._waiting, [], False
                names_changed, self._names_changed = self._names_changed, False
                if not batch and not names_changed:
                    self._running = False
                    self._changed.notify_all()
                    return
            commits = [commit for commit, _ in batch]
            sizes = [each.size for commit in commits for each in commit.staged]
            bug: BaseException | None = None
            try:
                # The blobs that a manifest needs are there by name before it is.
                self._flush_blobs(commits)
                if commits:
                    self._publish(commits)
            except BaseException as exc:  # noqa: BLE001 as concurrent.futures does: callers get it
                bug = exc
            for commit in commits:
                self._end(commit, bug)
            with self._changed:
                self._files -= len(sizes)
                self._bytes -= sum(sizes)
                self._changed.notify_all()
            for commit, done in batch:
                if failure := bug or commit.failure:
                    done.set_exception(failure)
                    log.event(logging.WARNING, "not kept", reason=failure)
                else:
                    done.set_result(None)

    def _flush_blobs(self, batch: list[Commit]) -> None:
        try:
            fsync_directory(self._blobs)
        except OSError as exc:
            for commit in batch:
                _fail(commit, self._blobs, exc)
            log.event(logging.WARNING, "blobs not flushed", reason=store_error(self._blobs, exc))

    def _publish(self, batch: list[Commit]) -> None:
        """Sets `failure` of those that cannot be published, or whose names may go again."""
        files = [(commit, each) for commit in batch for each in commit.staged]
        errors = self._in_parallel(os.fdatasync, [each.file for _, each in files])
        for commit, each in files:
            if each.file in errors:
                _fail(commit, Path(each.target), errors[each.file])
        self._rename(batch, manifests=True)
        self._rename(batch, manifests=False)

    def _end(self, commit: Commit, bug: BaseException | None) -> None:
        """Also after a bug: a lock that is held for ever would end all removal."""
        for each in commit.staged:
            if bug is not None:
                _drop(each)  # no effect on what has its name
            self.forget(each)
        with suppress(OSError):
            commit.release()

    def _rename(self, batch: list[Commit], *, manifests: bool) -> None:
        changed: dict[str, list[Commit]] = {}
        if manifests:
            changed = {str(folder): list(batch) for folder in self._folders}
        made: list[tuple[str, int]] = []
        for commit in batch:
            for each in commit.manifests if manifests else commit.records:
                if commit.failure is not None:
                    _drop(each)
                    continue
                try:
                    new = manifests and not os.path.exists(each.target)  # noqa: PTH110 hot path
                    folders = publish(each.path, each.target)
                except OSError as exc:
                    _fail(commit, Path(each.target), exc)
                    _drop(each)
                    continue
                if new:
                    made.append((each.target, each.size))
                for folder in folders:
                    changed.setdefault(folder, []).append(commit)
        if made:
            self.made(made)
        for folder, error in self._in_parallel(fsync_directory, list(changed)).items():
            for commit in changed[folder]:
                _fail(commit, Path(folder), error)

    def _in_parallel(self, work: Callable[[T], None], items: list[T]) -> dict[T, OSError]:
        """The errors, by item."""
        errors: dict[T, OSError] = {}

        def do(some: list[T]) -> None:
            for item in some:
                try:
                    work(item)
                except OSError as exc:
                    errors[item] = exc

        # One part for this thread, the others for those of the pool.
        own, *parts = [items[first::_FLUSHERS] for first in range(_FLUSHERS)]
        futures = []
        for part in filter(None, parts):
            try:
                futures.append(self._flushers.submit(do, part))
            except RuntimeError:  # the interpreter ends, or the system starts no thread
                do(part)
        do(own)
        for future in futures:
            future.result()
        return errors


def _drop(staged: _Staged) -> None:
    with suppress(OSError):
        os.unlink(staged.path)  # noqa: PTH108


def _fail(commit: Commit, path: Path, error: OSError) -> None:
    if commit.failure is None:
        commit.failure = store_error(path, error)
