"""Environment variables: which one a wrong value came from, and which are misspelt.

Tests: tests/cli/test_environment.py.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PREFIX: Final = "OCIPROXY_"
_SERVICE_LINK: Final = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_\w+)")
"""Kubernetes sets these for each Service of the namespace, such as one named `ociproxy`."""
_SERVICE_URLS: Final = ("tcp://", "udp://", "sctp://")
_SECRET: Final = ("PASSWORD", "TOKEN", "SECRET")
"""In the name of a variable that `password_env` of the configuration may well name."""


def blamed(error: click.BadParameter) -> click.BadParameter:
    """The error; if the value came from a variable, with the name of that."""
    parameter, context = error.param, error.ctx
    if parameter is None or context is None or parameter.name is None:
        return error
    if context.get_parameter_source(parameter.name) is not ParameterSource.ENVIRONMENT:
        return error
    variable, message = str(parameter.envvar), error.message
    if os.environ.get(variable, "").startswith(_SERVICE_URLS):
        message += (
            " Kubernetes sets it for a Service of this name: give the pod enableServiceLinks: false"
        )
    hint = f"{variable} ({parameter.opts[0]})"
    return click.BadParameter(message, context, parameter, hint)


def misspelt(context: click.Context) -> Iterator[str]:
    """A line for each variable of our prefix that no command reads. `context` is the group's."""
    names = sorted(name for name in os.environ if name.startswith(_PREFIX))
    own = set(_variables(context, [context.invoked_subcommand or ""]))
    known: set[str] = set()
    for name in names:
        if _SERVICE_LINK.fullmatch(name) or os.environ[name].startswith(_SERVICE_URLS):
            continue
        if name in own or any(word in name for word in _SECRET):
            continue
        # This imports all commands, so only for a variable that the one that runs does not know.
        known = known or set(_variables(context, _group(context).list_commands(context)))
        if name not in known:
            import difflib

            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"environment variable {name} is not known{hint}"


def _group(context: click.Context) -> click.Group:
    assert isinstance(context.command, click.Group)  # noqa: S101 the caller's
    return context.command


def _variables(context: click.Context, commands: Iterable[str]) -> Iterator[str]:
    for name in commands:
        command = _group(context).get_command(context, name)
        yield from (str(each.envvar) for each in command.params if each.envvar) if command else ()
