"""The command line: commands put together, errors in one line with their exit codes."""

from __future__ import annotations

from typing import Any

import click

from ociproxy import __version__
from ociproxy.cli.client_config import client_config
from ociproxy.cli.config_command import config
from ociproxy.cli.list_command import list_command
from ociproxy.cli.serve_command import serve
from ociproxy.errors import OciProxyError

_INTERRUPTED = 130


class _Failure(click.ClickException):
    def __init__(self, error: OciProxyError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc] # click's own subclasses differ by class


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OciProxyError as exc:
            raise _Failure(exc) from exc
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A pull-only, pull-through, caching OCI Distribution server."""


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


main.add_command(serve)
main.add_command(list_command)
main.add_command(client_config)
main.add_command(config)
