"""Where a command says what happens: lines, and bars below them on a terminal.

Always on standard error, so that standard output is a program's to read.
"""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.cli.bars import Bars
    from ociproxy.cli.progress import Step

_STDERR: Final = 2


class Screen:
    """Lines that stay, above bars that move."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        if os.isatty(_STDERR):  # False where it is closed
            # What draws takes as long to import as a small archive to read: a pipe need not wait.
            from ociproxy.cli.bars import open_bars

            self._bars = open_bars()

    def line(self, text: str) -> None:
        """One line, whatever stands in it: an upstream's or an archive's words may hold what a
        terminal obeys."""
        shown = "".join(map(_shown, text))
        if self._bars is None:
            click.echo(shown, err=True)
        else:
            self._bars.line(shown)

    def watching(
        self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> AbstractAsyncContextManager[None]:
        """Show bars while the block runs, if this is a terminal: one for everything, with rate and
        time left, and one for each step."""
        return nullcontext() if self._bars is None else self._bars.moving(overall, steps)

    def watching_work(self, overall: Callable[[], Step]) -> AbstractContextManager[None]:
        """The same for work that blocks: one bar, moved by a thread of its own."""
        return nullcontext() if self._bars is None else self._bars.moving_beside(overall)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "?"
