"""What `load` prints: a line an image or JSON events, and the outcome at the end.

Tests: tests/load/test_loader.py, tests/cli/test_progress.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from rich.filesize import decimal

from ociproxy.cli.terminal import counted, print_event
from ociproxy.errors import UpstreamRateLimited
from ociproxy.load.progress import Watcher
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.cli.screen import Screen
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.image import UpstreamImage
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.progress import Result, Summary

_QUIET: Final = 10.0
"""Many images wait for one upstream: for so many seconds after one wait was printed, and until it
ends, no other is printed, unless that ends later by more seconds than these."""
_FAILURES_HEAD: Final = "# images that were not loaded; `ociproxy load` accepts this list\n"
_PLAN_COLUMNS: Final = ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "NEW")


class Report(Watcher):
    """Prints each image as it ends; keeps the failures and the references that were loaded."""

    def __init__(self, screen: Screen, *, as_json: bool, verbose: bool = False) -> None:
        self._screen = screen
        self._verbose = verbose
        self._json = as_json
        self._began = time.monotonic()
        self._waited: dict[str, tuple[float, float]] = {}
        self._failures: list[tuple[Wanted, dict[str, Any]]] = []
        self._loaded: set[Reference] = set()

    def loaded(self, result: Result) -> None:
        image = result.image
        self.ended(image)
        self.say(
            "loaded",
            reference=str(image.reference),
            digest=str(image.top.descriptor.digest),
            platforms=[str(platform) for platform in image.platforms],
            lacking=[str(platform) for platform in image.lacking],
            withheld=[
                {"digest": str(layer.digest), "urls": layer.urls, "reason": reason}
                for layer, reason in result.withheld.items()
            ],
            size=image.size,
            fetched=result.fetched,
            seconds=round(result.seconds, 3),
        )

    def ended(self, image: UpstreamImage) -> None:
        """This image is no failure, and not unfinished."""
        self.ended_well(image.reference)
        if image.refused:
            refused = counted(
                len(image.refused),
                "referrer or signature tag was refused, and is",
                "referrers or signature tags were refused, and are",
            )
            self.note(f"{image.reference}: {refused} left out: {image.refused[0]}")

    def ended_well(self, reference: Reference) -> None:
        self._loaded.add(reference)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        event = _failure(wanted, error)
        self.keep_failure(wanted, event)
        self.say("failed", **event)

    def keep_failure(self, wanted: Wanted, event: dict[str, Any]) -> None:
        """For the list of failures, and the last event."""
        self._failures.append((wanted, event))

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        now = time.monotonic()
        said, until = self._waited.get(error.upstream, (-_QUIET, 0.0))
        if now < max(said + _QUIET, until) and now + seconds <= until + _QUIET:
            return
        self._waited[error.upstream] = now, now + seconds
        self.say("waiting", upstream=error.upstream, seconds=round(seconds, 3), reason=error.reason)

    def note(self, text: str) -> None:
        """Print something that the user should know and that is no failure."""
        self.say("note", text=text)

    def end(self, summary: Summary, *, interrupted: bool) -> None:
        self.say(
            "done",
            loaded=summary.loaded,
            failed=summary.failed,
            untried=summary.untried,
            fetched=summary.fetched,
            seconds=round(time.monotonic() - self._began, 3),
            interrupted=interrupted,
            failures=[event for _, event in self._failures],
        )

    def say(self, name: str, **event: Any) -> None:
        """Print an event of this load, or of one that a server runs: as JSON or in words."""
        if self._json:
            print_event(name, **event)
            return
        for line in _IN_WORDS[name](event, verbose=self._verbose):
            self._screen.line(line)

    def failure_list(self, wanted: list[Wanted]) -> str:
        """An image list of what was not loaded; the reason is a comment on each line."""
        lines = [
            f"{image}  # {' '.join(event['reason'].split())}\n" for image, event in self._failures
        ]
        ended = self._loaded | {image.reference for image, _ in self._failures}
        lines += [f"{each}  # not finished\n" for each in wanted if each.reference not in ended]
        return _FAILURES_HEAD + "".join(lines)


def _failure(wanted: Wanted, error: OciProxyError) -> dict[str, Any]:
    event = {
        "reference": str(wanted.reference),
        "place": wanted.place,
        "error": type(error).__name__,
        "reason": str(error),
        "transient": error.transient,
    }
    if isinstance(error, UpstreamRateLimited):
        event["retryAfter"] = error.retry_after
    return event


def _loaded_line(event: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    reference = Reference.parse(event["reference"])
    digest = Digest.parse(event["digest"])
    lacking = f", lacks {', '.join(event['lacking'])}" if event["lacking"] else ""
    named = digest if verbose else digest.short
    shown = f"{reference}" if reference.digest else f"{reference}@{named}"
    yield (
        f"loaded {shown} {decimal(event['size'])}, {decimal(event['fetched'])} fetched, "
        f"{event['seconds']:.1f} s{lacking}"
    )
    for layer in event["withheld"]:
        withheld = withheld_layer(layer["digest"], layer["reason"], layer["urls"])
        yield f"  incomplete: {withheld}"


def withheld_layer(digest: object, reason: str, urls: Sequence[str]) -> str:
    """How a person is told of a layer that need not be distributed, and is not."""
    where = f"; it may be at {urls[0]}" if urls else ""
    return f"no non-distributable layer {digest}: {reason}{where}"


def _failed_line(event: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    hint = ""
    if "retryAfter" in event:
        hint = f"; wait {event['retryAfter']:g} s, or raise --pull-timeout"
    yield f"failed {event['reference']} ({event['place']}): {event['reason']}{hint}"


def _waiting_line(event: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    seconds = round(event["seconds"], 1)
    yield f"waiting {seconds:g} s: upstream {event['upstream']}: {event['reason']}"


def _note_line(event: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    yield event["text"]


def _done_line(event: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    parts = [f"{event['loaded']} loaded"]
    if event["failed"]:
        parts.append(f"{event['failed']} failed")
    if event["untried"]:
        parts.append(f"{event['untried']} not finished")
    text = f"{', '.join(parts)}; {decimal(event['fetched'])} fetched in {event['seconds']:.1f} s"
    failures = event["failures"]
    if event["interrupted"]:
        text += "; interrupted: run it again to go on"
    elif failures and all(each["transient"] for each in failures):
        text += "; what failed may pass: run it again"
    yield text


_IN_WORDS: Final = {
    "loaded": _loaded_line,
    "failed": _failed_line,
    "waiting": _waiting_line,
    "note": _note_line,
    "done": _done_line,
}
