"""How far a pass over all files of a store has come: kept in the store, so that it survives a kill.

A pass takes the files in the order of their digests. Those are spread evenly, so a position says
which part is done, however the store changes meanwhile: what comes later behind the position was
verified when it was stored.
Tests: tests/cli/test_check_passes.py, tests/serve/test_scrub.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.store.files import store_errors
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.store.store import Store

SCRUB: Final = "scrub"
"""The pass that the servers of a store share."""
START: Final = ""
END: Final = "g"
"""After all hexadecimal digits."""
_TURN: Final = 3600.0
"""Seconds. A child process that starts once an hour costs next to nothing."""
_TURNS: Final = 20
"""Of a pass, at least."""
_DIGITS: Final = 16
_KEY: Final = re.compile(rf"[0-9a-f]{{{_DIGITS}}}")


@dataclass(frozen=True, slots=True)
class Pass:
    """Times are seconds since the epoch. All files before `position` are done."""

    began: float = 0.0
    position: str = START
    saved: float = 0.0
    """When it came so far."""
    finished: float = 0.0
    """When the pass before this one came to its end; 0 if none has."""
    damaged: dict[str, str] = field(default_factory=dict)
    """What was found damaged and is not repaired yet: file, a path in the store, and reason."""

    @property
    def part(self) -> float:
        """How much is done, 0 to 1."""
        if self.position in (START, END):
            return 1.0 if self.position else 0.0
        return int(self.position, 16) / 16**_DIGITS

    @property
    def ended(self) -> float:
        """When a pass last came to its end; 0 if none has."""
        return self.saved if self.position == END else self.finished


def key_of(name: str) -> str:
    """Where a pass comes to a file of this name: one that is named by no digest comes first."""
    key = name.rpartition("-")[2][:_DIGITS]
    return key if _KEY.fullmatch(key) else START


def position_at(part: float) -> str:
    """The position at which so much of a pass is done."""
    return END if part >= 1.0 else f"{int(max(part, 0.0) * 16**_DIGITS):0{_DIGITS}x}"


def turn_of(length: float) -> float:
    """Seconds from one turn of a scrub to the next, where a pass takes `length`."""
    return min(_TURN, length / _TURNS)


class PassFile:
    """The progress of one kind of pass over a store: `check`, or the servers' `scrub`."""

    def __init__(self, store: Store, name: str) -> None:
        self._path: Path = store.root / f"{name}.json"
        self._staging = store.staging.root

    def read(self) -> Pass | None:
        """None where no pass has begun, or the file is damaged. Raises StoreError."""
        with store_errors(self._path):
            try:
                found = Pass(**json.loads(self._path.read_bytes()))
                _ = found.part, dict(found.damaged), found.began + found.saved + found.finished
            except (FileNotFoundError, ValueError, TypeError, AttributeError):
                return None
        return found

    def write(self, progress: Pass) -> None:
        """Raises StoreError."""
        data = json.dumps(asdict(progress)).encode() + b"\n"
        write_atomically(self._path, data, staging=self._staging)

    def remove(self) -> None:
        """The pass has come to its end. Raises StoreError."""
        with store_errors(self._path):
            self._path.unlink(missing_ok=True)
