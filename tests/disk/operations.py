"""What was done to a disk, in order, and what a power cut may leave of it.

Of a file that was flushed (fsync) the bytes and times are safe, of a folder that was flushed its
entries. The rest may be lost:

- in order: of names and times a prefix of all changes survives, at least those that came before the
  last flush of anything, for that writes a journal. So do ext4, XFS and btrfs.
- out of order: each change of a name or a time survives or not, unless its file or folder was
  flushed after it. So POSIX allows.

The bytes of a file that were not flushed may be there, there in part, absent, or zeroes. A rename
is never half done.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 1


@dataclass(frozen=True, slots=True)
class Change:
    """A name in a folder means this file or folder from now on; None is no file."""

    folder: int
    name: str
    number: int | None


@dataclass(frozen=True, slots=True)
class Entries:
    changes: tuple[Change, ...]
    made: str = ""
    """Whether the file, or folder, is a new one."""


@dataclass(frozen=True, slots=True)
class Attributes:
    number: int
    mode: int | None = None
    atime: int | None = None
    mtime: int | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes at an offset; without bytes the file ends there from now on."""

    number: int
    offset: int
    data: bytes | None
    when: int


@dataclass(frozen=True, slots=True)
class Flush:
    number: int


Operation = Entries | Attributes | Write | Flush


@dataclass(slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    dirty: bool = False
    mode: int = 0o600
    atime: int = 0
    mtime: int = 0


def crash(
    operations: Sequence[Operation], source: random.Random, target: Path, *, ordered: bool
) -> None:
    """Make the folder `target` what a power cut after these operations may leave."""
    survivors = _survivors(operations, source, ordered=ordered)
    files: dict[int, _File] = {}
    folders: dict[int, dict[str, int]] = {ROOT: {}}
    for operation in operations:
        if isinstance(operation, Write):
            _write(files.setdefault(operation.number, _File()), operation)
        elif isinstance(operation, Flush) and operation.number in files:
            file = files[operation.number]
            file.safe, file.dirty = bytes(file.data), False
    for index in sorted(survivors):
        operation = operations[index]
        if isinstance(operation, Entries):
            for change in operation.changes:
                _enter(folders.setdefault(change.folder, {}), change)
            if operation.made == "folder":
                folders.setdefault(operation.changes[0].number or 0, {})
        elif isinstance(operation, Attributes):
            file = files.setdefault(operation.number, _File())
            file.mode = file.mode if operation.mode is None else operation.mode
            file.atime = file.atime if operation.atime is None else operation.atime
            file.mtime = file.mtime if operation.mtime is None else operation.mtime
        elif isinstance(operation, Write):
            files[operation.number].mtime = operation.when
    target.mkdir(parents=True)
    _make(target, ROOT, folders, files, source)


def _survivors(
    operations: Sequence[Operation], source: random.Random, *, ordered: bool
) -> set[int]:
    flushes = [i for i, each in enumerate(operations) if isinstance(each, Flush)]
    if ordered:
        return set(range(source.randint(flushes[-1] if flushes else 0, len(operations))))
    last: dict[int, int] = {}
    for index in flushes:
        flush = operations[index]
        assert isinstance(flush, Flush)
        last[flush.number] = index
    chance = source.random()
    return {
        index
        for index, each in enumerate(operations)
        if any(last.get(number, -1) > index for number in _touched(each))
        or source.random() < chance
    }


def _touched(operation: Operation) -> set[int]:
    """The files or folders whose flush makes it safe."""
    if isinstance(operation, Entries):
        return {change.folder for change in operation.changes}
    return {operation.number}


def _write(file: _File, operation: Write) -> None:
    file.dirty = True
    if operation.data is None:
        del file.data[operation.offset :]
        file.data.extend(bytes(operation.offset - len(file.data)))
        return
    file.data.extend(bytes(max(0, operation.offset - len(file.data))))
    file.data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _enter(folder: dict[str, int], change: Change) -> None:
    if change.number is None:
        folder.pop(change.name, None)
    else:
        folder[change.name] = change.number


def _make(
    path: Path,
    number: int,
    folders: dict[int, dict[str, int]],
    files: dict[int, _File],
    source: random.Random,
) -> None:
    for name, inner in folders[number].items():
        if inner in folders:
            (path / name).mkdir()
            _make(path / name, inner, folders, files, source)
            continue
        file = files.get(inner, _File())
        (path / name).write_bytes(_left(file, source))
        (path / name).chmod(file.mode)
        os.utime(path / name, ns=(file.atime, file.mtime))


def _left(file: _File, source: random.Random) -> bytes:
    """The bytes of a file after the cut."""
    if not file.dirty:
        return file.safe
    part = bytes(file.data[: source.randint(0, len(file.data))])
    return source.choice([file.safe, bytes(len(file.data)), part, bytes(file.data)])
