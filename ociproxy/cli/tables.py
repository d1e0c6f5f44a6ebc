"""Tables on standard output."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STDOUT: Final = 1
_PIPE_WIDTH: Final = 10_000
"""Columns: a pipe has no width, and no reference is to be cut short."""


def print_table(
    names: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """The columns in `numbers` stand to the right."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(
            name,
            no_wrap=True,
            overflow="ignore",
            justify="right" if name in numbers else "left",
        )
    for row in rows:
        table.add_row(*row)
    on_terminal = os.isatty(_STDOUT)  # whatever FORCE_COLOR says
    console = Console(
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=on_terminal,
        width=None if on_terminal else _PIPE_WIDTH,
    )
    console.print(table)
