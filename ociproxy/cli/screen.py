"""Standard error: lines, and on a terminal bars below them.

Tests: tests/cli/test_progress.py, tests/load/test_loader.py.
"""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.cli.progress import Bars
    from ociproxy.cli.terminal import Step

_STDERR: Final = 2


class Screen:
    """Standard error: lines that stay, and on a terminal bars below them.

    Standard output stays free for what a program reads.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None
        if os.isatty(_STDERR):  # False where standard error is closed
            from ociproxy.cli.progress import open_bars

            self._bars = open_bars()

    def line(self, text: str) -> None:
        """Print one line. An upstream or an archive may have put control characters and line
        breaks into the text: they are replaced."""
        shown = text if text.isprintable() else "".join(map(_shown, text))
        if self._bars is None:
            click.echo(shown, err=True)
        else:
            self._bars.line(shown)

    def watching(
        self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> AbstractAsyncContextManager[None]:
        """Show bars while an async block runs: one for all with rate and time left, one a step.

        A task of the event loop reads `overall` and `steps`. Without a terminal nothing is shown.
        """
        return nullcontext() if self._bars is None else self._bars.moving(overall, steps)

    def watching_work(self, overall: Callable[[], Step]) -> AbstractContextManager[None]:
        """Show one bar while a blocking block runs; a thread reads `overall`."""
        return nullcontext() if self._bars is None else self._bars.moving_beside(overall)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "?"
