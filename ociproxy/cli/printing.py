"""What commands print alike: JSON events, digests cut short."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest

_DIGITS: Final = 12


def print_event(name: str, **fields: object) -> None:
    """An object a line, on standard output."""
    click.echo(json.dumps({"event": name, **fields}))


def short(digest: Digest) -> str:
    """For people; a program gets all of it."""
    return f"{digest.algorithm}:{digest.encoded[:_DIGITS]}"
