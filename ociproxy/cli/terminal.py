"""What a command gives its user beside lines: JSON on standard output, files, and what bars show.
Tests: tests/cli/test_progress.py, tests/load/test_loader.py.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ociproxy.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

AS_JSON: Final = "ociproxy.as_json"
"""In the context's `meta`: whether an error that ends the command is printed as an event, too."""
INTERRUPTED: Final = 130
"""Exit code of a command that SIGINT or SIGTERM ended: 128 and SIGINT's number, as in shells."""

PIPE_CLOSED: Final = 141
"""Exit code where the reader of the output has left, as `head` does: that of SIGPIPE in shells."""


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of running work, as one bar shows it. `key` tells steps apart; `done` and `size`
    are bytes; `size` is None while it is unknown."""

    key: object
    name: str
    done: int
    size: int | None


@contextmanager
def sigterm_as_sigint() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as SIGINT does: a command ends in order."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_event(name: str, **fields: object) -> None:
    """Print one JSON object on a line of standard output."""
    click.echo(json.dumps({"event": name, **fields}))


def counted(number: int, one: str, many: str = "") -> str:
    """The number and what it counts: `many` is for all numbers but 1, else `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def printable(text: str) -> str:
    """Without control characters, which an archive or an upstream may have put into a platform."""
    return "".join(c if c.isprintable() else "?" for c in text)


def write_file(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Replace the file: a reader sees the old one or all of the new one, which keeps its mode; but
    a `secret` is for its owner alone. Raises OutputError."""
    with output_errors(path):
        mode = 0o644
        if path.exists():
            if not path.is_file():
                path.write_bytes(data)  # a terminal, a pipe
                return
            mode = stat.S_IMODE(path.stat().st_mode)
        if secret:
            mode &= 0o600
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchmod(descriptor, mode)
            os.replace(name, path)  # noqa: PTH105 - mkstemp gives a string
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_target(path: Path) -> None:
    """Raise OutputError if `write_file` could not write here: an hour of work comes first."""
    with output_errors(path):
        if not path.exists() or path.is_file():
            tempfile.TemporaryFile(prefix=f".{path.name}.", dir=path.parent).close()


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise OutputError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise OutputError(path, (error.strerror or str(error)).lower()) from error
