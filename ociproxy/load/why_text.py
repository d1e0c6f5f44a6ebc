"""What `why` says, for a person and for a program: the command prints it, a server's page shows it.

Tests: tests/cli/test_why_command.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from ociproxy.config.units import show_bytes, show_duration, utc_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.load.server_view import ServerView
    from ociproxy.load.why import Explanation
    from ociproxy.store.pruning.pins import Pin

_STATES: Final = {
    "whole": "yes",
    "blob": "yes: a config, a layer or the like",
    "incomplete": "not all of it",
    "only the tag": "only what the tag means: a client asked for the head of it",
    "damaged": "no: the stored manifest is damaged; `ociproxy check --repair` mends it",
    "withheld": "for other repositories only, and repositories are isolated",
    "absent": "no",
}
_SHOWN: Final = 5
"""Things of a kind that the screen names; further ones are counted."""


def lines(
    found: Explanation, pins: Sequence[Pin], view: ServerView | None
) -> Iterator[tuple[str, str]]:
    """Name and text of each; the name is empty for one that goes on with the line before. `view` is
    what a running server adds."""
    yield "cached", _cached(found)
    if found.contents is not None and found.contents.missing:
        missing = found.contents.missing.values()
        yield "missing", _few([f"{m.reason} ({m.descriptor.digest.short})" for m in missing])
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
    if found.left_out:
        yield "tags", "too many to look at all of them here: `ociproxy why` does"
    if found.within:
        yield "part of", _few([f"index {each.short}" for each in found.within])
    for pin in pins:
        yield "pinned", f"by {pin.by}: {pin.pattern}"
    for name, when in found.next_sync:
        yield "synced", f"by {name}, next at {utc_time(when)}"
    for number, step in enumerate(found.steps):
        yield "" if number else "next", step
    if view is not None:
        yield from view.lines()
        upstream = view.upstream
        if upstream is not None and upstream["listed"] is not found.listed:
            here, there = ("does", "does not") if found.listed else ("does not", "does")
            what = f"{there} list {upstream['registry']} in upstreams"
            yield "", f"It {what}; the configuration that this goes by {here}: see --config-path."


def _cached(found: Explanation) -> str:
    text = _STATES[found.state]
    if found.blob_size is not None:
        return f"{text}, {show_bytes(found.blob_size)}"
    if found.contents is None:
        return text
    images = [
        f"{'' if each.complete else 'not '}{each.platform}"
        for each in found.contents.images
        if each.platform is not None and each.platform.os != "unknown"
    ]
    whole = f": {', '.join(images)}" if images else ""
    absent = ", ".join(map(str, found.absent_platforms))
    return f"{text}{whole}, {show_bytes(found.contents.size)}" + (
        f"; nothing of {absent}" if absent else ""
    )


def _freshness(found: Explanation) -> str:
    resolved = f"resolved at {utc_time(found.resolved)}"
    if found.ttl is None or found.resolved is None:
        return f"{resolved}, fresh for ever ({found.ttl_rule})"
    until = utc_time(found.resolved + found.ttl)
    rule = f"{found.ttl_rule}: {show_duration(found.ttl)}"
    if found.clock_set_back:
        return f"{resolved}, later than now, so that it counts as expired: was the clock set back?"
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


def document(found: Explanation, pins: Sequence[Pin], view: ServerView | None) -> dict[str, object]:
    """The same for programs."""
    contents = found.contents
    images = [] if contents is None else contents.images
    missing = [] if contents is None else list(contents.missing.values())
    return {
        "reference": str(found.reference),
        "state": found.state,
        "digest": None if found.digest is None else str(found.digest),
        "size": (found.blob_size or 0) if contents is None else contents.size,
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
        "server": None if view is None else asdict(view),
    }
