"""Finding and running the real tools the tests use, each with an end."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
RUN_LIMIT = 60.0


def require_tool(name: str) -> str:
    """Its path. Without it a user's test is skipped; where `CI` is set the test fails."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""), SBIN)
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        _missing(f"needs {name}: see tools/test-packages.txt and tools/helm.txt")
    return path


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_module(name: str) -> Any:
    """The module. Without it a user's test is skipped; where `CI` is set the test fails."""
    if os.environ.get("CI"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"needs {name}: see the extras in pyproject.toml")


def go_install(package: str, folder: Path) -> Path:
    """The program that Go makes of a package of the Go module proxy, in `folder`. Without Go, or
    without that proxy, a user's test is skipped; where `CI` is set the test fails."""
    go = shutil.which("go", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/go/bin")
    if go is None:
        _missing("needs Go, on PATH or in /usr/local/go/bin")
    # Without inlining and symbols a build takes a quarter less.
    flags = ("-gcflags=all=-l", "-ldflags=-s -w")
    done = run(go, "install", *flags, package, env={"GOBIN": str(folder)}, check=False, limit=570)
    if done.returncode:
        _missing(f"go install {package}: {done.stderr.decode(errors='replace')[-500:]}")
    return folder / package.partition("@")[0].rpartition("/")[2]


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder as it is on a read-only medium, for every process on this machine."""
    require_root()
    run("mount", "--bind", folder, folder)
    try:
        run("mount", "-o", "remount,ro,bind", folder)
        yield
    finally:
        run("umount", folder)


def run(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
    limit: float = RUN_LIMIT,
) -> subprocess.CompletedProcess[bytes]:
    """A failure shows the command and what it said, which CalledProcessError does not."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=limit,
        check=False,
    )
    if check and done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")
        words = " ".join(str(part) for part in command)
        raise AssertionError(f"exit {done.returncode} from: {words}\n{said}")
    return done


class Daemon:
    """A process in the background with a log; `start` waits until the log says it is ready."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self.command = [str(part) for part in command]
        self.log_path = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: str, limit: float = 20.0) -> re.Match[str]:
        """`ready` is a pattern; the match is returned, for the port in it."""
        before = len(self.log())
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + limit
        while (found := re.search(ready, self.log()[before:])) is None:
            code = self.process.poll()
            if code is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"{self.command[0]} not ready (exit {code}):\n{self.log()}")
            time.sleep(0.02)
        return found

    def stop(self, limit: float = 10.0) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(limit)
        self.process = None

    def log(self) -> str:
        if not self.log_path.exists():
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size in memory, mounted there."""
    require_root()
    folder.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        run("umount", "-l", folder)
