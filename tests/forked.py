"""The product as processes that start fast: forked from one that has imported its modules.

A start of Python and the imports cost 0.8 s of processor time, and the tests start the product more
than a thousand times. A process made here has the arguments, environment, directory and standard
streams of the command that it stands for, runs the module as `python -m` does, and ends as that
would. Tests of how the product starts run the real command.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODULES: Final = ("ociproxy", "tests.watched")
_READ_AT_START: Final = ("PYTHONPATH", "LD_PRELOAD", "COVERAGE_PROCESS_CONFIG")
"""Variables that a process which runs already would not obey."""
_REQUEST: Final = 1 << 18
"""Bytes: the arguments and the environment of a process, and more."""


def popen(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
    """As subprocess.Popen."""
    if _can_be_forked(command, options.get("env") or os.environ):
        return Forked(command, **options)
    return subprocess.Popen(command, **options)


def run(
    command: Sequence[str | Path],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float = 60.0,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run, without `input`."""
    if capture_output:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _can_be_forked(command: Sequence[str | Path], env: Mapping[str, str]) -> bool:
    if [*command[:2]] != [sys.executable, "-m"] or command[2] not in MODULES:
        return False
    return not any(env.get(name) for name in _READ_AT_START)


class Forked(subprocess.Popen[Any]):
    """A child of the nursery, which tells on a socket how it ended."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """In place of fork and exec. `rest` is as in CPython 3.11 to 3.13."""
        cwd, env, streams, new_session = rest[4], rest[5], rest[9:15], rest[-2]
        request = {
            "module": args[2],
            "args": [os.fspath(each) for each in args[3:]],
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        stdin, _, _, stdout, _, stderr = streams
        files = [own if fd == -1 else fd for own, fd in enumerate((stdin, stdout, stderr))]
        self._end, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            Nursery.get().send(json.dumps(request).encode(), [*files, far.fileno()])
        self.pid = int(self._end.recv(32))
        self._child_created = True
        self._close_pipe_fds(*streams)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        flags = socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0
        try:
            status = self._end.recv(32, flags)
        except BlockingIOError:
            return 0, 0
        self._end.close()
        return self.pid, int(status or signal.SIGKILL)

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Nursery:
    """The process that forks; one for each process of tests."""

    _one: Nursery | None = None

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _REQUEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )

    @classmethod
    def get(cls) -> Nursery:
        if cls._one is None:
            cls._one = cls()
        return cls._one

    def send(self, request: bytes, files: list[int]) -> None:
        assert len(request) < _REQUEST
        socket.send_fds(self._socket, [request], files)


# The nursery's side


def nurse(control: socket.socket) -> dict[str, Any] | None:
    """Fork what is asked for until the tests end. Returns in each child what it is to run."""
    waker, woken = socket.socketpair()
    for each in (waker, woken):
        each.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(waker, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if waker in ready:
                with suppress(BlockingIOError):
                    waker.recv(4096)
                _tell_who_ended(children)
            if control in ready:
                raw, files, *_ = socket.recv_fds(control, _REQUEST, 4)
                if not raw:
                    return None
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _take(files[:3])
                    wanted: dict[str, Any] = json.loads(raw)
                    return wanted
                for fd in files[:3]:
                    os.close(fd)
                children[pid] = socket.socket(fileno=files[3])
                children[pid].send(str(pid).encode())


def _tell_who_ended(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as end, suppress(OSError):
            end.send(str(status).encode())


def _take(streams: list[int]) -> None:
    """These for the standard streams, and no other open file."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    os.closerange(3, 1024)


def become(request: dict[str, Any]) -> None:
    """What a start of Python does with them."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["new_session"]:
        os.setsid()
    sys.argv = [request["module"], *request["args"]]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        stream = io.TextIOWrapper(
            buffered,
            encoding="utf-8",
            errors="backslashreplace" if number == 2 else "strict",
            line_buffering=number == 2 or os.isatty(number),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _import_all() -> None:
    """What commands import when they need it."""
    for path in sorted(ROOT.glob("ociproxy/**/*.py")):
        if not path.stem.startswith("__"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    importlib.import_module("tests.watched")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _import_all()
    wanted = nurse(socket.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        become(wanted)
        with warnings.catch_warnings():  # runpy warns of a module that is imported already
            warnings.simplefilter("ignore", RuntimeWarning)
            runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)
