"""The command line: finds the command, prints an error as one line, exits with its code.

Tests: tests/test_docs.py, tests/real/test_bad_start.py, tests/cli/test_output.py,
tests/cli/test_start.py.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import resource
import sys
import traceback
from contextlib import suppress
from typing import IO, Any, Final

import click

from ociproxy import __version__
from ociproxy.cli.environment import blamed, misspelt
from ociproxy.cli.terminal import AS_JSON, INTERRUPTED, PIPE_CLOSED, print_event
from ociproxy.errors import OciProxyError, OutputError, StoreError

# A command's module is imported when the command runs. A server then has no progress bars in
# memory, and `list` starts without HTTP.
_COMMANDS: Final = {
    "serve": "ociproxy.cli.serve_command:serve",
    "load": "ociproxy.cli.load_command:load",
    "sync": "ociproxy.cli.sync_command:sync_command",
    "import": "ociproxy.cli.import_command:import_command",
    "list": "ociproxy.cli.list_command:list_command",
    "ready": "ociproxy.cli.ready_command:ready",
    "prune": "ociproxy.cli.prune_command:prune",
    "pins": "ociproxy.cli.pins_command:pins",
    "export": "ociproxy.cli.export_command:export_command",
    "why": "ociproxy.cli.why_command:why",
    "check": "ociproxy.cli.check_command:check_command",
    "diff": "ociproxy.cli.diff_command:diff_command",
    "client-config": "ociproxy.cli.client_config:client_config",
    "survey": "ociproxy.cli.survey_command:survey_command",
    "config": "ociproxy.cli.config_command:config",
}


_UNIT: Final = "INVOCATION_ID"
"""A variable that systemd gives to each process of a unit, which may be kept from most folders."""


class _Failure(click.ClickException):
    def __init__(self, error: OciProxyError) -> None:
        hint = ""
        cause = error.__cause__ if isinstance(error, StoreError) else None
        if isinstance(cause, PermissionError):
            hint = "; run as the user it belongs to, or say another store with --image-path"
        elif isinstance(cause, FileExistsError | NotADirectoryError):
            hint = "; say a folder with --image-path"
        elif isinstance(cause, OSError) and cause.errno == errno.EROFS and _UNIT in os.environ:
            hint = "; the unit needs a line ReadWritePaths= that names the store"
        # The text may quote an archive or an upstream: no control character may reach the terminal.
        said = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
        super().__init__(f"{said}{hint}")
        self.exit_code = error.exit_code  # type: ignore[misc] # click's own subclasses differ by class

    def show(self, file: IO[Any] | None = None) -> None:
        with suppress(OSError):  # the exit code says it, too, where no message can be written
            super().show(file)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        if not gc.isenabled():  # by `__main__`
            gc.freeze()
            gc.enable()
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as exc:
            advice = f"Options stand behind the command: ociproxy COMMAND {exc.option_name}"
            raise click.UsageError(f"{exc.format_message()} {advice}", ctx) from exc

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.BadParameter as exc:
            raise blamed(exc) from exc
        except OciProxyError as exc:
            if ctx.meta.get(AS_JSON):
                print_event(
                    "error", error=type(exc).__name__, reason=str(exc), exitCode=exc.exit_code
                )
            raise _Failure(exc) from exc
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except OSError as exc:
            if not _is_of_output(exc):
                raise
            _drop_output()
            if exc.errno == errno.EPIPE:
                ctx.exit(PIPE_CLOSED)
            raise _Failure(OutputError("the output", (exc.strerror or str(exc)).lower())) from exc


def _is_of_output(error: OSError) -> bool:
    """Whether a line that the command prints could not be written."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == click.echo.__module__


def _drop_output() -> None:
    """Python would try to write what is buffered once more at the end, and change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A pull-only, pull-through, caching OCI Distribution server."""
    if ctx.invoked_subcommand != "serve":  # which logs them
        for line in misspelt(ctx):
            click.echo(f"Warning: {line}", err=True)
    # A core dump would contain the passwords of the upstreams.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
