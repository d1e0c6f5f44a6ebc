"""How large a folder of the store is: a walk, for commands and child processes.

Tests: tests/serve/admin/test_survey.py, tests/cli/test_capped_store.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path


def size_of(folder: Path) -> tuple[int, int]:
    """Files of a folder and of those in it, and their bytes. Raises StoreError."""
    objects = size = 0
    waiting = [os.fspath(folder)]
    while waiting:
        with store_errors(folder):
            try:
                entries = os.scandir(waiting.pop())
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    try:
                        size += entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue
                    objects += 1
    return objects, size
