"""`ociproxy load --server URL`: a running server loads the images, and its events are printed here.

The lists are read here, so that a bad line is reported as by any other load.

Tests: tests/serve/admin/test_load.py.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import click

from ociproxy.cli.server_client import ServerRefused, ServerUnavailable
from ociproxy.cli.terminal import INTERRUPTED, sigterm_as_sigint
from ociproxy.errors import OciProxyError
from ociproxy.load.progress import Summary

if TYPE_CHECKING:
    import http.client
    from collections.abc import Sequence

    from ociproxy.cli.load_report import Report
    from ociproxy.cli.server_client import AdminListener
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.platform import Platform

_SILENCE: Final = 60.0
"""Seconds that the server may say nothing: while a load runs it says something every 10 s."""
_LINE: Final = 64 * 1024 * 1024
"""Bytes of an event: the last one has every failure."""
_HEADERS: Final = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
_LOCAL_ONLY: Final = (
    "image_path",
    "config_path",
    "log_level",
    "log_format",
    "jobs",
    "pull_timeout",
    "backend",
)
_BESIDE_STORE: Final = {
    "plan": "run it without --server, beside the server's store",
    "lock": "run it without --server, beside the server's store; or list the digests, for a line "
    "NAME:TAG@sha256:... loads just that one",
}
"""Options that need the store at hand, and what to do instead."""
_LINE_NUMBER: Final = re.compile(r":(\d+)$")


class LoadFailed(OciProxyError):
    """The load ended with an error of its own: `exit_code` is that of the command."""

    def __init__(self, reason: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(reason)


def check_options(ctx: click.Context) -> None:
    """Raises click.UsageError for an option that only a load in this process obeys."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        option = max(parameter.opts, key=len)
        if name in _BESIDE_STORE:
            raise click.UsageError(f"{option} excludes --server: {_BESIDE_STORE[name]}")
        if name in _LOCAL_ONLY:
            raise click.UsageError(f"{option} is up to the server: leave it out with --server")


class ServerLoad:
    """One load by a server."""

    def __init__(self, server: AdminListener, report: Report) -> None:
        self._server = server
        self._report = report

    def run(
        self,
        wanted: Sequence[Wanted],
        platforms: tuple[Platform, ...] | None,
        *,
        referrers: bool,
        pin: bool,
        fail_fast: bool,
    ) -> int:
        """The exit code. `platforms` are for images that name none of their own, empty for all;
        None leaves the choice to the server. Raises ServerRefused, ServerUnavailable, LoadFailed.
        """
        if not wanted:
            self._report.end(Summary(), interrupted=False)
            return 0
        query = [("platform", str(each)) for each in platforms or ()]
        if platforms == ():
            query.append(("platform", "all"))
        flags = {"referrers": referrers, "pin": pin, "fail-fast": fail_fast}
        query += [(name, "true") for name, given in flags.items() if given]
        lines = [str(each) if each.strict else str(each.reference) for each in wanted]
        path = f"/api/load?{urlencode(query)}"
        body = json.dumps(lines).encode()
        try:
            with (
                sigterm_as_sigint(),
                self._server.ask("POST", path, body, _HEADERS, timeout=_SILENCE) as events,
            ):
                return self._follow(events, wanted)
        except KeyboardInterrupt:
            self._report.note("interrupted: the server goes on with a load that it has begun")
            return INTERRUPTED

    def _follow(self, events: http.client.HTTPResponse, wanted: Sequence[Wanted]) -> int:
        named = {str(each.reference): each for each in wanted}
        error: LoadFailed | None = None
        while line := events.readline(_LINE):
            try:
                event = json.loads(line)
                name = event.pop("event")
                if name == "error":
                    error = LoadFailed(str(event["reason"]), int(event["exitCode"]))
                elif name != "exit":
                    self._print(name, event, named, wanted)
                elif error is None:
                    return int(event["exitCode"])
            except (ValueError, LookupError, TypeError, AttributeError) as exc:
                raise ServerRefused(f"{self._server.url}: no event of a load") from exc
            if name == "exit" and error is not None:
                raise error
        raise ServerUnavailable(f"{self._server.url}: cut off; the server may go on loading")

    def _print(
        self, name: str, event: dict[str, Any], named: dict[str, Wanted], wanted: Sequence[Wanted]
    ) -> None:
        if name == "running":
            return
        if name == "loaded":
            self._report.ended_well(named[event["reference"]].reference)
        elif name == "failed":
            self._report.keep_failure(named[event["reference"]], _placed(event, wanted))
        elif name == "done":
            event["failures"] = [_placed(each, wanted) for each in event["failures"]]
        self._report.say(name, **event)


def _placed(event: dict[str, Any], wanted: Sequence[Wanted]) -> dict[str, Any]:
    """The event with the place in the lists that were read here: what was posted has a line for
    each image."""
    found = _LINE_NUMBER.search(event["place"])
    if found is not None and 0 < int(found[1]) <= len(wanted):
        event["place"] = wanted[int(found[1]) - 1].place
    return event
