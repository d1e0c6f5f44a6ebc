"""`ociproxy config`: check a configuration file; print its JSON Schema.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from ociproxy.cli.terminal import counted
from ociproxy.config.file import read_config, schema
from ociproxy.errors import ConfigError


@click.group("config")
def config() -> None:
    """Validate a configuration file; print its JSON Schema."""


@config.command("check", short_help="Say what is wrong with a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def check(ctx: click.Context, file: Path) -> None:
    """Say what is wrong with FILE, a line per problem; exit with 2 if anything is.

    The files that FILE names are checked too; no upstream is asked.
    """
    try:
        found = read_config(file)
    except ConfigError as error:
        # Printed without `Error: ` in front: editors jump to `file:line:`.
        click.echo(str(error), err=True)
        ctx.exit(error.exit_code)
    click.echo(f"{file}: ok, {counted(len(found.upstreams), 'upstream')}")


@config.command("schema")
def print_schema() -> None:
    """Print the JSON Schema (draft 2020-12) of the configuration file."""
    click.echo(json.dumps(schema(), indent=2))
