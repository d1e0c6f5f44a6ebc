"""`python -m ociproxy.cli.child COMMAND ...`: a command that a server runs beside itself.

It yields the processor to the server, and ends when its standard input does: then the server has
ended, in order or not.
Tests: tests/serve/test_housekeeping.py.
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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.serve.housekeeping import MakeCommand

_NICE: Final = 10
"""About a tenth of a busy processor: less would keep publishers waiting for a removal."""
_END_TIME: Final = 10.0
"""Seconds that the command has to end in order once its server has gone."""


def command_maker(config_path: Path | None) -> MakeCommand:
    """For children of a server with this configuration file."""

    def make(store: Path, config: Config, words: Sequence[str]) -> list[str]:
        options = ["--image-path", str(store), "--log-format", config.log.format]
        if config_path is not None:
            options += ["--config-path", str(config_path)]
        # -P: the program is the installed one, whatever the folder of the server has.
        return [sys.executable, "-P", "-m", __name__, *words, "--json", *options]

    return make


def _run() -> None:
    os.nice(_NICE)
    with suppress(OSError):  # where memory runs out, it ends before the server does
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    Thread(target=_end_with_server, name="lifeline", daemon=True).start()
    _forget_options(sys.argv[1])
    main()


def _end_with_server() -> None:
    os.read(sys.stdin.fileno(), 1)
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
