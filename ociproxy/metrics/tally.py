"""Numbers in memory that the processes of a server share: each counts in a row of its own.

The rows are made before the workers fork. A row outlives its process: a worker that replaces a
killed one goes on where that stopped, so no count is lost and none is made twice. The reader adds
the rows up. A row is an append-only table of keys, an array of numbers, and two buffers for what
the process is doing now.

The last rows are for child processes, such as a sync. A child inherits the memory as a file and
takes the first row that no other child has locked; the kernel frees the row at its end.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

Key = tuple[str, ...]

_KEYS: Final = 128 * 1024
"""Bytes of a row for the names of what is counted."""
_VALUES: Final = 4096
"""Numbers of a row. Where keys or numbers are full, a new key counts as `LOST`, once."""
_STATE: Final = 192 * 1024
"""Bytes of what a process is doing now."""
_HEAD: Final = 64
_ROW: Final = _HEAD + _VALUES * 8 + _KEYS + 2 * _STATE
_USED_KEYS, _USED_VALUES, _STATES_SET = range(3)
"""Numbers of the head: bytes of keys, numbers in use, how often the state was set."""
_LENGTH: Final = struct.Struct("<Q")
LOST: Final[Key] = ("ociproxy_series_lost",)
_SCRAP: Final[Key] = ("",)
"""Its numbers are those of keys that found no room: no reader looks at them."""
_WIDEST: Final = 32
"""Numbers of one key at most."""
_FOR_CHILDREN: Final = 16
"""Rows of child processes: more than run at once, also while those of a killed worker end."""


class Tally:
    """The rows of one server. `use` says which one this process counts in."""

    def __init__(self, rows: int, *, file: int = -1, row: int = 0) -> None:
        self.file = file
        """The memory as a file descriptor, for child processes; -1 where these cannot join."""
        self._memory = memoryview(mmap.mmap(file, rows * _ROW))
        self._rows = [_Row(self._memory[n * _ROW : (n + 1) * _ROW]) for n in range(rows)]
        self.use(row)

    @classmethod
    def shared(cls, rows: int) -> Tally:
        """With so many rows for forked processes, and those of child processes."""
        file = os.memfd_create("tally")
        rows += _FOR_CHILDREN
        os.ftruncate(file, rows * _ROW)
        return cls(rows, file=file)

    @classmethod
    def joined(cls, file: int) -> Tally | None:
        """What the server shares that this process is a child of, whose `file` it inherited. None
        where no row is free, or the server is of a version with other rows."""
        rows, rest = divmod(os.fstat(file).st_size, _ROW)
        if rest:
            return None
        for row in range(rows - _FOR_CHILDREN, rows):
            try:
                # Of this process, whatever else has the file open: the kernel ends it with it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row * _ROW)
            except OSError:
                continue
            return cls(rows, file=file, row=row)
        return None

    def use(self, row: int) -> None:
        """Count in this row from now on, after what it holds. Forgets the state it holds."""
        self._row = self._rows[row]
        self.values = self._row.values
        self.found: dict[tuple[object, ...], tuple[int, ...]] = {}
        """Places that a caller has asked `find` for, under the names that it gave them."""
        self._places = {key: place for key, place, _ in self._row.entries()}
        self._place(LOST, 1)
        self._place(_SCRAP, _WIDEST)
        self._row.set_state(b"")
        # Also in a forked process: a thread of the parent may have held the lock just then.
        self._lock = Lock()

    def add(self, key: Key, by: float) -> None:
        with self._lock:
            place = self._places.get(key)
            if place is None:
                place = self._place(key, 1)
            self.values[place] += by

    def observe(self, key: Key, bucket: int, buckets: int, value: float) -> None:
        """Count 1 in a bucket of so many, and add `value` to the sum that follows them."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                place = self._place(key, buckets + 1)
            self.values[place + bucket] += 1
            self.values[place + buckets] += value

    def find(self, name: tuple[object, ...], *keys: tuple[Key, int]) -> tuple[int, ...]:
        """The places of these keys, of so many numbers each, for a caller that counts often. It is
        the only one that counts them, and does so in `values` without the lock."""
        with self._lock:
            self.found[name] = tuple(self._place(key, count) for key, count in keys)
        return self.found[name]

    def set_state(self, state: dict[str, Any]) -> bool:
        """What this process is doing now, in place of what it said before. False where it is too
        long, and then the one before stays."""
        text = json.dumps(state, separators=(",", ":")).encode()
        if len(text) > _STATE - _LENGTH.size:
            return False
        self._row.set_state(text)
        return True

    def totals(self) -> dict[Key, list[float]]:
        """Every key with its numbers, added up over the rows."""
        found: dict[Key, list[float]] = {}
        for row in self._rows:
            for key, place, count in row.entries():
                numbers = [*map(float, row.values[place : place + count])]
                before = found.get(key)
                if before is not None:
                    numbers = [a + b for a, b in zip(before, numbers, strict=True)]
                found[key] = numbers
        return found

    def states(self) -> list[dict[str, Any]]:
        """What each process said last, of those that said something."""
        return [json.loads(text) for row in self._rows if (text := row.state())]

    def _place(self, key: Key, count: int) -> int:
        place = self._places.get(key)
        if place is None:
            place = self._row.append(key, count)
            if place is None:
                place = self._places[_SCRAP]
                self.values[self._places[LOST]] += 1
            if len(self._places) < 4 * _VALUES:
                self._places[key] = place
        return place


class _Row:
    def __init__(self, memory: memoryview) -> None:
        self._head = memory[:_HEAD].cast("Q")
        memory = memory[_HEAD:]
        self.values: memoryview[float] = memory[: _VALUES * 8].cast("d")
        memory = memory[_VALUES * 8 :]
        self._keys = memory[:_KEYS]
        self._states = (memory[_KEYS : _KEYS + _STATE], memory[_KEYS + _STATE :])

    def entries(self) -> Iterator[tuple[Key, int, int]]:
        """Each key with the place and the number of its numbers."""
        for line in bytes(self._keys[: self._head[_USED_KEYS]]).splitlines():
            place, count, *key = json.loads(line)
            yield tuple(key), place, count

    def append(self, key: Key, count: int) -> int | None:
        """The place of a new key; None where there is no room. The key is whole before the head
        says that it is there, so that a kill leaves nothing half-written."""
        start, place = self._head[_USED_KEYS], self._head[_USED_VALUES]
        line = json.dumps([place, count, *key]).encode() + b"\n"
        if start + len(line) > _KEYS or place + count > _VALUES:
            return None
        self._keys[start : start + len(line)] = line
        # First: numbers that no key has are harmless, and two keys must not share any.
        self._head[_USED_VALUES] = place + count
        self._head[_USED_KEYS] = start + len(line)
        return place

    def set_state(self, text: bytes) -> None:
        number = self._head[_STATES_SET] + 1
        buffer = self._states[number % 2]
        buffer[_LENGTH.size : _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(buffer, 0, len(text))
        self._head[_STATES_SET] = number

    def state(self) -> bytes:
        """Read again where the writer came round to the buffer meanwhile."""
        while True:
            number = self._head[_STATES_SET]
            buffer = self._states[number % 2]
            (length,) = _LENGTH.unpack_from(buffer, 0)
            text = bytes(buffer[_LENGTH.size : _LENGTH.size + length])
            if self._head[_STATES_SET] == number:
                return text
