"""A disk for tests that fails, hangs, kills or loses power on command.

`with faulty_disk(folder) as disk: disk.fail("ENOSPC")`; the files are in `disk.root`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.disk.operations import Operation
from tests.parts.tools import require_root, require_tool, run
from tests.server import ROOT

READY = 10.0
"""Seconds that mounting may take."""


class Disk:
    def __init__(self, folder: Path) -> None:
        self._backing, self.root = folder / "backing", folder / "disk"
        for each in (self._backing, self.root):
            each.mkdir(parents=True)
        program = [sys.executable, "-m", "tests.disk.filesystem"]
        self._process = subprocess.Popen(
            [*program, self._backing, self.root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def await_ready(self) -> None:
        end = time.monotonic() + READY
        while not os.path.ismount(self.root):
            assert self._process.poll() is None, "the disk cannot be mounted"
            assert time.monotonic() < end, "the disk is not mounted in time"
            time.sleep(0.01)

    def close(self) -> None:
        """What hangs goes on; open files give errors from then on."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(READY)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            run("umount", "-l", self.root, check=False)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _tell(self, *words: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def fail(self, fault: str, pattern: str = "*", *, after: int = 0) -> None:
        """From now on it has this fault (`faults.FAULTS`) for paths that fit the glob; with `after`
        once so many changes and flushes were made."""
        self._tell("fail", fault, pattern, after)

    def heal(self) -> None:
        self._tell("fail", "", "*", 0)

    def hang(self, *operations: str, pattern: str = "*") -> None:
        """These operations do not return until `release`."""
        self._tell("hang", operations, pattern)

    def release(self) -> None:
        self._tell("release")

    def waiting(self) -> int:
        """How many operations hang now."""
        count: int = self._tell("waiting")
        return count

    def kill_at(self, step: int) -> None:
        """Kill the process that is about to make this change or flush, counted from now on."""
        self._tell("kill_at", step)

    def steps(self) -> int:
        """Changes and flushes since `fail`, `heal` or `kill_at`."""
        count: int = self._tell("steps")
        return count

    def operations(self) -> Sequence[Operation]:
        """All that was done to it, for `operations.crash`."""
        path = self._backing.with_name("operations")
        self._tell("dump", str(path))
        made: list[Operation] = pickle.loads(path.read_bytes())  # noqa: S301 our own process wrote it
        return made


@contextlib.contextmanager
def faulty_disk(folder: Path) -> Iterator[Disk]:
    """Where this machine has no FUSE the test is skipped."""
    require_root()
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    require_tool("fusermount3")
    disk = Disk(folder)
    try:
        disk.await_ready()
        yield disk
    finally:
        disk.close()
