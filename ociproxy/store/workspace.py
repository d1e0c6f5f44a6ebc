"""Directories in `pulls/` for what another program writes before it is verified.

One process owns a directory, by `flock` on it; what a dead one left behind goes to the next owner
of the name, or to `Staging.sweep`.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Self

from ociproxy.store.files import is_at, store_errors, try_lock

if TYPE_CHECKING:
    from pathlib import Path


class Workspace:
    """Its owner calls `remove`, or uses it as a context manager."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @staticmethod
    def lead(path: Path) -> Workspace | None:
        """Own this directory, made if need be; None while another process does, or another part
        of this one. Blocks for no lock. Raises StoreError."""
        with store_errors(path):
            while True:
                path.mkdir(mode=0o700, exist_ok=True)
                try:
                    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # its owner has just removed it
                try:
                    mine = try_lock(lock)
                    if mine and is_at(lock, path):
                        return Workspace(path, lock)
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)
                if not mine:
                    return None

    def remove(self) -> None:
        """Give it up with all that is in it."""
        try:
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
