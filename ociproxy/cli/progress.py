"""How far long work has come: bars on a terminal, a line a thing in a pipe.

Always on standard error, so that standard output is a program's to read.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from rich.console import Console

_STDERR: Final = 2


@dataclass(frozen=True, slots=True)
class Step:
    """One thing in work; `key` tells it from others, sizes are bytes, and a size that is not
    known yet is None."""

    key: object
    name: str
    done: int
    size: int | None


class Screen:
    """Where a command says what happens: lines that stay, above bars that move."""

    def __init__(self) -> None:
        self._console: Console | None = None
        if os.isatty(_STDERR):  # False where it is closed
            # What draws takes as long to import as a small archive to read: a pipe need not wait.
            from ociproxy.cli.bars import open_console

            self._console = open_console()

    def line(self, text: str) -> None:
        """One line, whatever stands in it: an upstream's or an archive's words may hold what a
        terminal obeys."""
        shown = "".join(map(_shown, text))
        if self._console is None:
            click.echo(shown, err=True)
        else:
            self._console.print(shown)

    @asynccontextmanager
    async def watching(
        self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> AsyncIterator[None]:
        """Show bars while the block runs, if this is a terminal: one for everything, with rate and
        time left, and one for each step."""
        if self._console is None:
            yield
            return
        from ociproxy.cli.bars import Bars

        async with Bars(self._console).moving(overall, steps):
            yield

    @contextmanager
    def watching_work(self, overall: Callable[[], Step]) -> Iterator[None]:
        """The same for work that blocks: one bar, moved by a thread of its own."""
        if self._console is None:
            yield
            return
        from ociproxy.cli.bars import Bars

        with Bars(self._console).moving_beside(overall):
            yield


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "?"
