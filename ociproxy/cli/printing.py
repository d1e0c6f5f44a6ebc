"""What commands print alike: JSON events, tables, digests cut short."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ociproxy.digest import Digest

_DIGITS: Final = 12
_PIPE_WIDTH: Final = 10_000
"""Columns: a pipe has no width, and no reference is to be cut short."""


def print_event(name: str, **fields: object) -> None:
    """An object a line, on standard output."""
    click.echo(json.dumps({"event": name, **fields}))


def print_table(
    names: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """On standard output; the columns in `numbers` stand to the right."""
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
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)


def short(digest: Digest) -> str:
    """For people; a program gets all of it."""
    return f"{digest.algorithm}:{digest.encoded[:_DIGITS]}"
