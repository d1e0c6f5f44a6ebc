"""`python -m ociproxy.cli.child FILE COMMAND ...`: a command that a server runs beside itself.

It yields the processor to the server, and ends when its standard input does: then the server has
ended, in order or not. A command that reads `-` gets what the server sends there before a zero
byte. FILE is the descriptor of the server's counters, in which it counts; -1 where there are none.
Tests: tests/serve/test_housekeeping.py, tests/serve/admin/test_load.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Final

import click

from ociproxy.cli.main import main
from ociproxy.metrics import counters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.serve.housekeeping import MakeCommand

_NICE: Final = 10
"""About a tenth of a busy processor: less would keep publishers waiting for a removal."""
_PIECE: Final = 64 * 1024
_END_TIME: Final = 10.0
"""Seconds that the command has to end in order once its server has gone."""


def command_maker(config_path: Path | None) -> MakeCommand:
    """For children of a server with this configuration file."""

    def make(store: Path, config: Config, words: Sequence[str]) -> list[str]:
        options = ["--image-path", str(store), "--log-format", config.log.format]
        if config_path is not None:
            options += ["--config-path", str(config_path)]
        # -P: the program is the installed one, whatever the folder of the server has.
        program = [sys.executable, "-P", "-m", __name__, *map(str, counters.inherited() or (-1,))]
        return [*program, *words, "--json", *options]

    return make


def _run() -> None:
    os.nice(_NICE)
    with suppress(OSError):  # where memory runs out, it ends before the server does
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _join(int(sys.argv.pop(1)))
    lifeline = _take_input() if sys.argv[2:3] == ["-"] else sys.stdin.fileno()
    Thread(target=_end_with_server, args=(lifeline,), name="lifeline", daemon=True).start()
    _forget_options(sys.argv[1])
    main()


def _join(file: int) -> None:
    with suppress(OSError):  # no such file: what this process does is not counted
        os.set_inheritable(file, False)  # skopeo and credential helpers count nothing
        counters.join(file)


def _take_input() -> int:
    """Make what comes before a zero byte all of standard input; return the pipe, which stays."""
    lifeline = os.dup(sys.stdin.fileno())
    taken = bytearray()
    while not taken.endswith(b"\0"):
        piece = os.read(lifeline, _PIECE)
        if not piece:
            sys.exit(1)  # the server has gone
        taken += piece
    spool = os.memfd_create("input")
    with open(spool, "wb", closefd=False) as file:
        file.write(taken[:-1])
    os.lseek(spool, 0, os.SEEK_SET)
    os.dup2(spool, sys.stdin.fileno())
    os.close(spool)
    return lifeline


def _end_with_server(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_END_TIME)
    os._exit(1)


def _forget_options(name: str) -> None:
    """The environment is the server's, whose variables are not meant for this command."""
    with click.Context(main) as context:
        command = main.get_command(context, name)
        for parameter in () if command is None else command.params:
            os.environ.pop(str(parameter.envvar), None)


if __name__ == "__main__":
    _run()
