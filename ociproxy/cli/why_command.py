"""`ociproxy why REFERENCE`: one screen about one reference, in plain words."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.cli.options import config_path, configuration, image_path, served_store
from ociproxy.cli.pins_command import all_pins
from ociproxy.cli.server_client import server_auth_option
from ociproxy.cli.terminal import printable, short, utc_time
from ociproxy.cli.why_server import look
from ociproxy.config.units import show_duration
from ociproxy.load.imagelist import parse_reference
from ociproxy.load.why import explain
from ociproxy.store.pruning.pins import Pins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ociproxy.load.why import Explanation
    from ociproxy.store.pruning.pins import Pin

_STATES: Final = {
    "whole": "yes",
    "incomplete": "not all of it",
    "only the tag": "only what the tag means: a client asked for the head of it",
    "damaged": "no: the stored manifest is damaged; `ociproxy check --repair` mends it",
    "withheld": "for other repositories only, and repositories are isolated",
    "absent": "no",
}
_SHOWN: Final = 5
"""Things of a kind that the screen names; further ones are counted."""


@click.command("why", short_help="Explain what a request for an image would get, and why.")
@click.argument("reference")
@image_path
@config_path
@click.option(
    "--server",
    metavar="URL",
    envvar="OCIPROXY_SERVER",
    help="The admin listener to ask for the last request.  [default: that of serve.admin, if it "
    "answers]",
)
@server_auth_option
@click.option("--json", "as_json", is_flag=True, envvar="OCIPROXY_JSON", help="Print JSON.")
def why(
    reference: str,
    image_path: Path | None,
    config_path: Path | None,
    server: str | None,
    server_auth: Path | None,
    as_json: bool,
) -> None:
    """Explain one image: is it cached and whole, is its tag fresh, which rules apply, what keeps
    it, and what the next request for it would do. Asks no upstream. A running server tells the last
    request for it, and whether the upstream is left alone."""
    config = configuration(config_path, image_path=image_path)
    with ExitStack() as stack:
        store = served_store(config, stack)
        found = explain(store, config, parse_reference(reference), now=time.time())
        pins = []
        if found.digest is not None:
            met = (found.reference, found.digest)
            pins = [pin for pin in all_pins(store, config) if Pins([pin]).match(*met)]
    view = look(server, server_auth, config, found.reference)
    if as_json:
        document = {**_document(found, pins), "server": None if view is None else asdict(view)}
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(found.reference)
    for name, text in (*_lines(found, pins), *(view.lines() if view is not None else ())):
        click.echo(f"  {name:<10}{printable(text)}")


def _lines(found: Explanation, pins: Sequence[Pin]) -> Iterator[tuple[str, str]]:
    yield "cached", _cached(found)
    if found.contents is not None and found.contents.missing:
        missing = found.contents.missing.values()
        yield "missing", _few([f"{m.reason} ({short(m.descriptor.digest)})" for m in missing])
    if found.digest is not None:
        yield "digest", str(found.digest)
    if found.resolved is not None:
        yield "tag", _freshness(found)
    if found.last_used is not None:
        yield "used", f"last at {utc_time(found.last_used)}"
    yield "upstream", _upstream(found)
    if found.refusal is not None:
        yield "refused", found.refusal
    if found.contents is not None:
        yield from _beside(found)
    if found.same:
        yield "same as", _few([str(each) for each in found.same])
    if found.within:
        yield "part of", _few([f"index {short(each)}" for each in found.within])
    for pin in pins:
        yield "pinned", f"by {pin.by}: {pin.pattern}"
    for name, when in found.next_sync:
        yield "synced", f"by {name}, next at {utc_time(when)}"
    for number, step in enumerate(found.steps):
        yield "" if number else "next", step


def _cached(found: Explanation) -> str:
    text = _STATES[found.state]
    if found.contents is None:
        return text
    images = [
        f"{'' if each.complete else 'not '}{each.platform}"
        for each in found.contents.images
        if each.platform is not None and each.platform.os != "unknown"
    ]
    whole = f": {', '.join(images)}" if images else ""
    absent = ", ".join(map(str, found.absent_platforms))
    return f"{text}{whole}, {decimal(found.contents.size)}" + (
        f"; nothing of {absent}" if absent else ""
    )


def _freshness(found: Explanation) -> str:
    resolved = f"resolved at {utc_time(found.resolved)}"
    if found.ttl is None or found.resolved is None:
        return f"{resolved}, fresh for ever ({found.ttl_rule})"
    until = utc_time(found.resolved + found.ttl)
    rule = f"{found.ttl_rule}: {show_duration(found.ttl)}"
    if found.expired:
        return f"{resolved}, expired since {until} ({rule})"
    return f"{resolved}, fresh until {until} ({rule})"


def _upstream(found: Explanation) -> str:
    if found.unasked is not None:
        return f"not asked: {found.unasked}"
    listed = "listed in upstreams" if found.listed else "no entry in upstreams"
    return f"{', '.join(found.upstream)} ({listed})"


def _beside(found: Explanation) -> Iterator[tuple[str, str]]:
    contents = found.contents
    if contents is None:
        return
    if contents.referrers:
        yield "referrers", f"{len(contents.referrers)} stored"
    if contents.unstored_attestations:
        lacking = len(contents.unstored_attestations)
        yield "referrers", f"{lacking} attestations not stored, which Docker 29.1 and newer pulls"


def _few(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _document(found: Explanation, pins: Sequence[Pin]) -> dict[str, object]:
    contents = found.contents
    images = [] if contents is None else contents.images
    missing = [] if contents is None else list(contents.missing.values())
    return {
        "reference": str(found.reference),
        "state": found.state,
        "digest": None if found.digest is None else str(found.digest),
        "size": 0 if contents is None else contents.size,
        "platforms": [
            {"platform": str(i.platform or ""), "digest": str(i.digest), "complete": i.complete}
            for i in images
        ],
        "absentPlatforms": [str(platform) for platform in found.absent_platforms],
        "missing": [{"digest": str(m.descriptor.digest), "reason": m.reason} for m in missing],
        "lastUsed": utc_time(found.last_used),
        "resolved": utc_time(found.resolved),
        "ttl": found.ttl,
        "ttlRule": found.ttl_rule or None,
        "expired": found.expired,
        "refusal": found.refusal,
        "upstream": list(found.upstream),
        "unasked": found.unasked,
        "listed": found.listed,
        "referrers": 0 if contents is None else len(contents.referrers),
        "unstoredAttestations": [
            str(each.digest) for each in (contents.unstored_attestations if contents else ())
        ],
        "same": [str(each) for each in found.same],
        "partOf": [str(each) for each in found.within],
        "pins": [{"pattern": pin.pattern, "by": pin.by} for pin in pins],
        "sync": [{"sync": name, "next": utc_time(when)} for name, when in found.next_sync],
        "next": found.steps,
    }
