"""Each file of `blobs/`, `img/` and `fat/` against its name: which are damaged, or have no seal.

Several threads read, at one rate together, and record no use. A file that
comes or goes meanwhile is no finding: another process commits, or takes damage out of service.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, guess_media_type
from ociproxy.store.files import (
    UNREADABLE,
    digest_of,
    hash_file,
    is_at,
    is_sealed,
    open_unused,
    store_errors,
    take_out,
)
from ociproxy.store.passes import END, START, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import FileIO
    from pathlib import Path

    from ociproxy.store.store import Store

JOBS: Final = min(os.cpu_count() or 1, 8)
"""Files that are hashed at once: more than eight wait for the disk, or for each other."""
_KNOWN: Final = 250_000
"""Manifests of which a check remembers that they were hashed: 40 MB. Those above it are hashed a
second time."""


class Throttle:
    """Bytes a second of all threads together; None is no limit. Thread-safe."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = 0.0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End all work that is throttled, at its next piece."""
        self._stopped.set()

    def took(self, count: int) -> None:
        """Wait until so many bytes were due. Raises Stopped."""
        if self._rate:
            with self._lock:
                now = time.monotonic()
                self._free = max(self._free, now) + count / self._rate
                due = self._free - now
            self._stopped.wait(due)
        if self._stopped.is_set():
            raise Stopped


class Stopped(Exception):
    """The work was told to end."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A file whose bytes are not those that its name says; `file` is its path in the store, or was
    until it went to `quarantine/`."""

    file: str
    digest: Digest
    reason: str
    in_quarantine: bool = False


class FileCheck:
    """One look at all files, or at those from one position of a pass (`passes`) to another. With
    `quick` a blob's bytes are not read: only its seal is looked at. Manifests are small, and always
    hashed. With `take_out` what is damaged moves to `quarantine/` at once, so that no server takes
    it for whole any more."""

    def __init__(
        self,
        store: Store,
        *,
        jobs: int = JOBS,
        rate: int | None = None,
        quick: bool = False,
        take_out: bool = False,
        first: str = START,
        end: str = END,
    ) -> None:
        self.damaged: dict[str, Damage] = {}
        """By the path of the file: a manifest may be stored as a blob, too."""
        self.unsealed: set[str] = set()
        """With `quick`: the paths of blobs that have no seal."""
        self.strays: list[str] = []
        """Paths of what has no digest for a name, or is no file."""
        self.blobs = 0
        self.manifests = 0
        self.read = 0
        """Bytes that were read."""
        self._known: set[str] = set()
        """Paths of manifests that the caller has hashed."""
        self._store = store
        self._jobs = jobs
        self.quick = quick
        self._take_out = take_out
        self._throttle = Throttle(rate)
        self._lock = threading.Lock()
        self._first = first
        self._end = end
        self._next = first
        self._looking: dict[int, str] = {}
        """By thread: the key of the file that it looks at."""

    @property
    def position(self) -> str:
        """All files before it were looked at."""
        with self._lock:
            return min((self._next, *self._looking.values()))

    def hashed(self, path: str, size: int) -> None:
        """The caller has read this manifest, and its bytes are right: `run` does not read it."""
        if path not in self._known:
            self._hashed(size)
            if len(self._known) < _KNOWN:
                self._known.add(path)

    def size(self) -> int:
        """Bytes that `run` will read, or the caller for it."""
        folders = self._store.manifests.folders if self.quick else self._folders
        sizes = 0
        for folder in folders:
            with store_errors(folder), os.scandir(folder) as entries:
                for entry in entries:
                    if self._first <= key_of(entry.name) < self._end:
                        with suppress(FileNotFoundError):
                            sizes += entry.stat().st_size
        return sizes

    def run(
        self, again: Iterable[str] = (), *, progressed: Callable[[], object] = lambda: None
    ) -> None:
        """Look at all files, and before them at those of `again`, paths in the store. `progressed`
        is called from time to time. Raises StoreError where a file cannot be read for want of
        permission, or the like; also what interrupts it. All threads have ended then."""
        folders = {folder.name: folder for folder in self._folders}
        for folder, _, name in (each.partition("/") for each in again):
            if folder in folders and digest_of(name) is not None:
                self._look(folders[folder], name)
        entries = self._entries()
        with ThreadPoolExecutor(self._jobs, "check") as pool:
            working = [pool.submit(self._work, entries) for _ in range(self._jobs)]
            try:
                # In short turns: only so does a signal reach a thread that waits.
                while wait(working, timeout=0.2).not_done:
                    if any(each.done() and each.exception() for each in working):
                        break
                    progressed()
            finally:
                self._throttle.stop()
        for each in working:
            error = each.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error

    @property
    def _folders(self) -> tuple[Path, ...]:
        return (self._store.blobs.folder, *self._store.manifests.folders)

    def _entries(self) -> Iterator[tuple[str, Path, str]]:
        """What to look at, in the order of a pass, with the position of each."""
        return heapq.merge(*map(self._sorted, self._folders))

    def _sorted(self, folder: Path) -> Iterator[tuple[str, Path, str]]:
        with store_errors(folder):
            names = os.listdir(folder)  # noqa: PTH208 fast
        # Nothing but the names stays in memory.
        names = [name for name in names if self._first <= key_of(name) < self._end]
        names.sort(key=key_of)
        for name in names:
            yield key_of(name), folder, name

    def _work(self, entries: Iterator[tuple[str, Path, str]]) -> None:
        thread = threading.get_ident()
        while True:
            self._throttle.took(0)
            with self._lock:  # an iterator serves one thread at a time
                self._looking.pop(thread, None)
                found = next(entries, None)
                if found is None:
                    self._next = self._end
                    return
                self._next = self._looking[thread] = found[0]
            # Where it ends in an error, its key stays: the file was not looked at.
            self._look(*found[1:])

    def _look(self, folder: Path, name: str) -> None:
        digest = digest_of(name)
        shown = f"{folder.name}/{name}"
        if digest is None:
            self.strays.append(shown)
            return
        path = f"{folder}/{name}"
        if path in self._known:
            self._count(is_blob=False)
            return
        is_blob, reason, out = folder is self._store.blobs.folder, "", False
        try:
            with open_unused(path) as file:
                if is_blob and self.quick:
                    if not is_sealed(os.fstat(file.fileno()), name):
                        self.unsealed.add(shown)
                else:
                    reason = self._fault(file, digest, is_blob=is_blob)
                if reason:
                    here = folder / name
                    if not is_at(file.fileno(), here):
                        return  # Another process has just replaced or removed it.
                    out = self._take_out and take_out(file.fileno(), here, self._store.quarantine)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            self.strays.append(shown)
            return
        except OSError:
            with store_errors(path):
                raise
        self._count(is_blob=is_blob)
        if reason:
            with self._lock:
                self.damaged[shown] = Damage(shown, digest, reason, out)

    def _count(self, *, is_blob: bool) -> None:
        with self._lock:
            if is_blob:
                self.blobs += 1
            else:
                self.manifests += 1

    def _fault(self, file: FileIO, digest: Digest, *, is_blob: bool) -> str:
        """What is wrong with the bytes of a file; empty if they are right."""
        try:
            if is_blob:
                hasher = digest.hasher()
                hash_file(file, hasher, self._hashed)
                actual = Digest.finish(hasher, digest.algorithm)
            else:
                if os.fstat(file.fileno()).st_size > MANIFEST_MAX_SIZE:
                    return f"is larger than {MANIFEST_MAX_SIZE} bytes, as no manifest is"
                # Not `read` with that limit: its buffer alone took longer than the file.
                raw = file.readall()
                self._hashed(len(raw))
                actual = Digest.of(raw, digest.algorithm)
                if actual == digest:
                    guess_media_type(raw)
        except MalformedManifest as exc:
            return f"is no manifest: {exc}"
        except OSError as exc:
            if exc.errno not in UNREADABLE:
                raise
            return f"cannot be read: {exc.strerror}".lower()
        return "" if actual == digest else f"its bytes are those of {actual}"

    def _hashed(self, count: int) -> None:
        with self._lock:
            self.read += count
        self._throttle.took(count)
