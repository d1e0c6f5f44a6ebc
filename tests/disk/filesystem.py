"""A file system that passes everything on to a folder, and fails, hangs or kills on command.

It is a process of its own: `python -m tests.disk.filesystem FOLDER MOUNTPOINT`. Each line on its
standard input is a command, a JSON object; each is answered by a line. It ends, and what hangs with
it, when that input ends. What was done to the disk is kept in order (`operations`), so that power
cuts can be imitated afterwards.
"""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mfusepy

from tests.disk.faults import Switch
from tests.disk.operations import ROOT, Attributes, Change, Entries, Flush, Operation, Write

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
STATS = (
    "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_mode", "st_nlink", "st_uid", "st_gid",
    "st_size", "st_ino", "st_blocks",
)  # fmt: skip


class Filesystem(mfusepy.Operations):  # type: ignore[misc] # it has no types
    use_ns = True
    # Open files are known by their number: they may have lost their name.
    flag_nullpath_ok = flag_nopath = True

    def __init__(self, folder: str, switch: Switch) -> None:
        self._folder = folder
        self._switch = switch
        self._lock = threading.Lock()
        self._operations: list[Operation] = []
        self._numbers: dict[int, int] = {}
        self._files: dict[int, tuple[int, str]] = {}
        """The number and the path of what is open."""
        self._next = ROOT
        self._number_of(folder)

    def dump(self, path: str) -> None:
        """Write what was done to the disk, pickled."""
        with self._lock:
            Path(path).write_bytes(pickle.dumps(self._operations))

    def _begin(self, operation: str, path: str) -> None:
        self._switch.begin(operation, path, mfusepy.fuse_get_context()[2])

    def _begin_open(self, operation: str, file: int) -> int:
        """The same of what is open; gives its number."""
        number, path = self._files[file]
        self._begin(operation, path)
        return number

    def _real(self, path: str) -> str:
        return self._folder + path

    def _number_of(self, real: str) -> int:
        """Of the file or folder that is there: the number that `operations` know it by."""
        inode = os.lstat(real).st_ino
        if inode not in self._numbers:
            self._numbers[inode] = self._next
            self._next += 1
        return self._numbers[inode]

    def _new_number(self, real: str) -> int:
        """Of what was made just now: the inode may have been another file's."""
        self._numbers.pop(os.lstat(real).st_ino, None)
        return self._number_of(real)

    def _entry(self, path: str, number: int | None) -> Change:
        parent, _, name = self._real(path).rpartition("/")
        return Change(self._number_of(parent), name, number)

    def _record(self, operation: Operation) -> None:
        self._operations.append(operation)

    # Looking

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, Any]:
        if path is not None:
            self._begin("getattr", path)
        state = os.fstat(fh or 0) if path is None else os.lstat(self._real(path))
        found: dict[str, Any] = {key: getattr(state, key) for key in STATS if key[-3:] != "_ns"}
        for key in ("st_atime", "st_mtime", "st_ctime"):
            found[key] = getattr(state, f"{key}_ns")
        return found

    def opendir(self, path: str) -> int:
        self._begin("opendir", path)
        return self._open(path, os.O_RDONLY | os.O_DIRECTORY)

    def readdir(self, path: None, fh: int) -> Iterable[tuple[str, dict[str, int], int]]:
        for entry in os.scandir(fh):
            kind = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
            yield entry.name, {"st_mode": kind, "st_ino": entry.inode()}, 0

    def open(self, path: str, flags: int) -> int:
        self._begin("open", path)
        writing = flags & (os.O_WRONLY | os.O_RDWR)
        if writing:
            self._begin("open to write", path)
        return self._open(path, (os.O_RDWR if writing else os.O_RDONLY) | os.O_NOATIME)

    def _open(self, path: str, flags: int) -> int:
        with self._lock:
            file = os.open(self._real(path), flags)
            self._files[file] = self._number_of(self._real(path)), path
        return file

    def read(self, path: None, size: int, offset: int, fh: int) -> bytes:
        self._begin_open("read", fh)
        return os.pread(fh, size, offset)

    def release(self, path: None, fh: int) -> int:
        with self._lock:
            del self._files[fh]
            os.close(fh)
        return 0

    def releasedir(self, path: None, fh: int) -> int:
        return self.release(path, fh)

    def statfs(self, path: str) -> dict[str, int]:
        state = os.statvfs(self._folder)
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree")
        found = {key: getattr(state, key) for key in keys}
        if self._switch.is_full:
            found["f_bfree"] = found["f_bavail"] = 0
        return {**found, "f_namemax": 255}

    # Changing

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._begin("create", path)
        with self._lock:
            real = self._real(path)
            file = os.open(real, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            number = self._new_number(real)
            self._files[file] = number, path
            self._record(Entries((self._entry(path, number),), made="file"))
        return file

    def mkdir(self, path: str, mode: int) -> int:
        self._begin("mkdir", path)
        with self._lock:
            os.mkdir(self._real(path), mode)  # noqa: PTH102 as FUSE calls it
            number = self._new_number(self._real(path))
            self._record(Entries((self._entry(path, number),), made="folder"))
        return 0

    def write(self, path: None, data: bytes, offset: int, fh: int) -> int:
        number = self._begin_open("write", fh)
        with self._lock:
            os.pwrite(fh, data, offset)
            self._record(Write(number, offset, data, time.time_ns()))
        return len(data)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> int:
        if path is None:
            number = self._begin_open("truncate", fh or 0)
        else:
            self._begin("truncate", path)
            number = self._number_of(self._real(path))
        with self._lock:
            os.truncate(fh or 0 if path is None else self._real(path), length)
            self._record(Write(number, length, None, time.time_ns()))
        return 0

    def link(self, target: str, source: str) -> int:
        self._begin("link", target)
        with self._lock:
            os.link(self._real(source), self._real(target))
            self._record(Entries((self._entry(target, self._number_of(self._real(source))),)))
        return 0

    def unlink(self, path: str) -> int:
        self._begin("unlink", path)
        with self._lock:
            change = self._entry(path, None)
            os.unlink(self._real(path))  # noqa: PTH108 the same
            self._record(Entries((change,)))
        return 0

    def rmdir(self, path: str) -> int:
        self._begin("rmdir", path)
        with self._lock:
            change = self._entry(path, None)
            os.rmdir(self._real(path))  # noqa: PTH106 the same
            self._record(Entries((change,)))
        return 0

    def rename(self, old: str, new: str) -> int:
        self._begin("rename", new)
        with self._lock:
            number = self._number_of(self._real(old))
            changes = self._entry(old, None), self._entry(new, number)
            os.rename(self._real(old), self._real(new))  # noqa: PTH104 the same
            self._record(Entries(changes))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._begin("chmod", path)
        with self._lock:
            os.chmod(self._real(path), mode)  # noqa: PTH101 the same
            self._record(Attributes(self._number_of(self._real(path)), mode=mode & 0o7777))
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        self._begin("chmod", path)
        os.chown(self._real(path), uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._begin("utimens", path)
        with self._lock:
            state = os.lstat(self._real(path))
            old, now = (state.st_atime_ns, state.st_mtime_ns), time.time_ns()
            atime, mtime = (
                now if new == UTIME_NOW else before if new == UTIME_OMIT else new
                for new, before in zip(times or (UTIME_NOW, UTIME_NOW), old, strict=True)
            )
            os.utime(self._real(path), ns=(atime, mtime))
            number = self._number_of(self._real(path))
            self._record(Attributes(number, atime=atime, mtime=mtime))
        return 0

    def fsync(self, path: None, datasync: int, fh: int) -> int:
        number = self._begin_open("fsync", fh)
        with self._lock:
            self._record(Flush(number))
        return 0

    def fsyncdir(self, path: None, datasync: int, fh: int) -> int:
        number = self._begin_open("fsyncdir", fh)
        with self._lock:
            self._record(Flush(number))
        return 0


def obey(filesystem: Filesystem, switch: Switch, mountpoint: str) -> None:
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer = getattr(filesystem if command == "dump" else switch, command)(*arguments)
        print(json.dumps(answer), flush=True)
    switch.release()
    subprocess.run(["umount", "-l", mountpoint], check=False)
    os._exit(0)


def main(folder: str, mountpoint: str) -> None:
    switch = Switch()
    filesystem = Filesystem(folder, switch)
    threading.Thread(target=obey, args=(filesystem, switch, mountpoint), daemon=True).start()
    mfusepy.FUSE(
        filesystem, mountpoint, foreground=True, fsname="faulty",
        use_ino=True, hard_remove=True, entry_timeout=0, negative_timeout=0, attr_timeout=3600,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
