"""Files of the store as they were at one moment. There are hundreds of thousands, so many of them
take some two hundred bytes of memory each.

Tests: tests/cli/test_prune_command.py.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_STATE: Final = Struct("<qQqqB")
"""A `StoredFile` without its name; then the number of its folder. Some file systems use all bits of
an inode's number."""


class StoredFile(NamedTuple):
    """One file; `size` is bytes, times are nanoseconds since the epoch."""

    file: str
    size: int
    inode: int
    modified: int
    accessed: int

    @staticmethod
    def of(file: str | Path, state: os.stat_result) -> StoredFile:
        path = os.fspath(file)
        return StoredFile(path, state.st_size, state.st_ino, state.st_mtime_ns, state.st_atime_ns)

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def used(self) -> float:
        """When it was used last, in seconds since the epoch."""
        return self.accessed / 10**9

    @property
    def stored(self) -> float:
        return self.modified / 10**9

    def is_unchanged(self) -> bool:
        """Whether it is there, and was neither used nor written again since."""
        try:
            now = os.stat(self.file)  # noqa: PTH116 of each in a batch
        except FileNotFoundError:
            return False
        seen = self.inode, self.modified, self.accessed
        return (now.st_ino, now.st_mtime_ns, now.st_atime_ns) == seen


class StoredFiles(MutableMapping[str, StoredFile]):
    """Files of a few folders by name, in the order in which they were added. Each is made where it
    is asked for."""

    def __init__(self, named: Callable[[str], str] = str) -> None:
        """A file is called `named` of its name here."""
        self._named = named
        self._folders: list[str] = []
        self._states: dict[str, bytes] = {}

    def only(self, names: Iterable[str]) -> StoredFiles:
        """Those of these names, which are all here, in the order of the names."""
        found = StoredFiles(self._named)
        found._folders = self._folders
        found._states = {name: self._states[name] for name in names}
        return found

    def total(self, names: Iterable[str] | None = None) -> int:
        """Bytes of all of them, or of those of these names that are here."""
        states = self._states
        found = states.values() if names is None else (states[n] for n in names if n in states)
        return sum(_STATE.unpack(state)[0] for state in found)

    def __getitem__(self, name: str) -> StoredFile:
        size, inode, modified, accessed, folder = _STATE.unpack(self._states[name])
        path = f"{self._folders[folder]}{os.sep}{self._named(name)}"
        return StoredFile(path, size, inode, modified, accessed)

    def __setitem__(self, name: str, each: StoredFile) -> None:
        folder = each.file.rpartition(os.sep)[0]
        if folder not in self._folders:
            self._folders.append(folder)
        number = self._folders.index(folder)
        self._states[name] = _STATE.pack(*each[1:], number)

    def __delitem__(self, name: str) -> None:
        del self._states[name]

    def __contains__(self, name: object) -> bool:
        return name in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)
