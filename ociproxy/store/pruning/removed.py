"""`removed.json`: the images that prunes removed last, and why, for an operator who misses one.

Each prune writes it at its end, also where it was interrupted. One that is killed, or has lost its
turn to another one, leaves its images out.
Tests: tests/cli/test_prune_command.py, tests/serve/test_eviction.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.store.files import store_errors
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ociproxy.store.store import Store

MOST: Final = 50
"""Images that are kept, the last ones."""
BY_OPERATOR: Final = "prune by an operator"
_LARGEST: Final = 256 * 1024
"""Bytes of the file that are read: names are shorter than 1000 characters."""


@dataclass(frozen=True, slots=True)
class RemovedImage:
    """Times are seconds since the epoch."""

    at: float
    reference: str
    size: int
    """Bytes of all of it, also of what other images share and so stayed."""
    last_used: float
    reason: str
    """The setting that had it removed, or `BY_OPERATOR`."""


def read_removed(store: Store) -> list[RemovedImage]:
    """The newest last; empty where nothing was removed, or the file is damaged. Raises
    StoreError."""
    path = store.root / "removed.json"
    with store_errors(path):
        try:
            with path.open("rb") as file:
                found = [RemovedImage(**each) for each in json.loads(file.read(_LARGEST))]
            _ = [(e.at + e.size + e.last_used, e.reference + e.reason) for e in found]
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return []
    return found[-MOST:]


def add_removed(store: Store, removed: Sequence[RemovedImage], folder: Path) -> None:
    """`folder` is the remover's: it is taken away from one that has lost its turn, so no such one
    writes over what the next one wrote. Raises StoreError."""
    if removed:
        kept = [*read_removed(store), *removed][-MOST:]
        data = json.dumps([asdict(each) for each in kept], indent=1).encode() + b"\n"
        write_atomically(store.root / "removed.json", data, staging=folder)
