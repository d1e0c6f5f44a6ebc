"""Tables on standard output. In a pipe each row is one line with all columns. On a terminal a
table is made to fit, and no reference, number or unit is ever cut.

Tests: tests/cli/test_table.py, tests/cli/test_list_command.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final

import click

from ociproxy.cli.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STDOUT: Final = 1
_GAP: Final = "  "
_LISTED: Final = re.compile(r"[^,]+,?")
"""A part of a cell that may stand on a line of its own: `linux/amd64,` and `linux/arm64`."""

Row = Sequence[str]


def print_table(
    names: Row,
    rows: Iterable[Row],
    *,
    numbers: Sequence[str] = (),
    spare: Sequence[str] = (),
    folding: Sequence[str] = (),
) -> None:
    """Print a table on standard output; the columns in `numbers` are aligned to the right.

    On a terminal that is too narrow, the columns in `spare` are left out, the first one first; then
    the cells of those in `folding` are broken at commas; then the first column of each row has a
    line of its own.
    """
    on_terminal = os.isatty(_STDOUT)
    width = shutil.get_terminal_size().columns if on_terminal else None
    table = [names, *([printable(cell) for cell in row] for row in rows)]
    for number, line in enumerate(_lines(table, width, numbers, spare, folding)):
        click.echo(click.style(line, bold=True) if on_terminal and number == 0 else line)


def _lines(
    table: Sequence[Row],
    width: int | None,
    numbers: Sequence[str],
    spare: Sequence[str],
    folding: Sequence[str],
) -> Iterator[str]:
    """The lines for a terminal of `width` columns; None is a pipe."""
    if width is None:
        yield from chain.from_iterable(_laid_out(table, numbers))
        return
    for name in spare:
        if _width(table) > width:
            dropped = table[0].index(name)
            table = [_without(row, dropped) for row in table]
    folded = _folded(table, width, folding)
    if _width(folded) <= width:
        yield from chain.from_iterable(_laid_out(folded, numbers))
        return
    rest = _folded([_without(row, 0) for row in table], width - len(_GAP), folding)
    for row, lines in zip(table, _laid_out(rest, numbers), strict=True):
        yield row[0]
        yield from (_GAP + line for line in lines)


def _without(row: Row, dropped: int) -> Row:
    return [cell for at, cell in enumerate(row) if at != dropped]


def _width(table: Sequence[Row]) -> int:
    return sum(_widths(table)) + len(_GAP) * (len(table[0]) - 1)


def _widths(table: Sequence[Row]) -> list[int]:
    """Of each column; a cell may have several lines."""
    return [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(*table, strict=True)
    ]


def _folded(table: Sequence[Row], width: int, folding: Sequence[str]) -> Sequence[Row]:
    """The table with line ends in the cells of these columns, as far as it is too wide."""
    for at, name in enumerate(table[0]):
        over = _width(table) - width
        if name in folding and over > 0:
            room = _widths(table)[at] - over
            table = [
                [_fold(cell, room) if i == at else cell for i, cell in enumerate(row)]
                for row in table
            ]
    return table


def _fold(cell: str, room: int) -> str:
    lines = [""]
    for part in _LISTED.findall(cell):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _laid_out(table: Sequence[Row], numbers: Sequence[str]) -> Iterator[Iterator[str]]:
    """The lines of each row."""
    widths = _widths(table)
    for row in table:
        yield (
            _GAP.join(
                part.rjust(width) if name in numbers else part.ljust(width)
                for part, width, name in zip(parts, widths, table[0], strict=True)
            ).rstrip()
            for parts in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
        )
