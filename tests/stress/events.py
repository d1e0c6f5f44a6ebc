"""What happens to a store's files, in the order in which the kernel did it (inotify)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ociproxy.store.usage import UsageFile

CONTENT = ("blobs", "img", "fat")
PULLS = "pulls"
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _ISDIR = 0x4000, 0x40000000
_HEAD = struct.Struct("iIII")
_BUFFER = 1024 * 1024
_LOOK = 0.1
"""Seconds between two looks at whether the end has come."""


@dataclass(frozen=True, slots=True)
class Event:
    """`when` is when it was read, in seconds since the epoch: a moment later."""

    when: float
    folder: str
    name: str
    came: bool
    moved: bool
    """By a rename; else it was made or deleted there."""
    counted: str = ""
    """What `locks/usage` said when the event of a file of content was read."""

    def __str__(self) -> str:
        verb = {(True, True): "renamed to", (True, False): "made as"}
        verb |= {(False, True): "renamed from", (False, False): "deleted from"}
        return f"{verb[self.came, self.moved]} {self.folder}/{self.name}"


class Recorder:
    """Records from the moment on when it is made. The folders have to be there."""

    def __init__(self, store: Path) -> None:
        self.events: list[Event] = []
        self.sizes: dict[str, int] = {}
        """Bytes of each file of content that came."""
        self.is_whole = True
        """False where the kernel dropped events."""
        self._store = store
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._usage = UsageFile(store / "locks/usage")
        self._folders = {}
        for name in (*CONTENT, PULLS):
            mask = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
            watch = libc.inotify_add_watch(self._file, os.fsencode(store / name), mask)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            self._folders[watch] = name
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    def stop(self) -> None:
        """All that happened before is recorded when it returns."""
        self._ending.set()
        self._thread.join()
        os.close(self._file)

    def _counted(self) -> str:
        usage = self._usage.read()
        return "" if usage is None else f"{usage.stored} + {usage.reserved}, run {usage.runs}"

    def _run(self) -> None:
        while True:
            ended = self._ending.is_set()
            if select.select([self._file], [], [], 0 if ended else _LOOK)[0]:
                self._take(os.read(self._file, _BUFFER))
            elif ended:
                return

    def _take(self, data: bytes) -> None:
        now, at = time.time(), 0
        while at < len(data):
            watch, mask, _, length = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            name = data[at : at + length].rstrip(b"\0").decode()
            at += length
            if mask & _OVERFLOW:
                self.is_whole = False
            elif not mask & _ISDIR:
                came = bool(mask & (_MOVED_TO | _CREATE))
                moved = bool(mask & (_MOVED_TO | _MOVED_FROM))
                folder = self._folders[watch]
                counted = "" if folder == PULLS else self._counted()
                self.events.append(Event(now, folder, name, came, moved, counted))
                if came and folder in CONTENT and name not in self.sizes:
                    with contextlib.suppress(FileNotFoundError):
                        self.sizes[name] = (self._store / folder / name).stat().st_size
