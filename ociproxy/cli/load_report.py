"""What `load` says: a line an image, or JSON events, and at the end how it went."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from rich.filesize import decimal

from ociproxy.cli.printing import print_event
from ociproxy.errors import UpstreamRateLimited
from ociproxy.load.loader import TRANSIENT, Watcher

if TYPE_CHECKING:
    from ociproxy.cli.screen import Screen
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.loader import Result, Summary
    from ociproxy.oci.reference import Reference

_QUIET: Final = 10.0
"""Seconds between two lines on one upstream's being waited for, unless that takes longer by as
much."""
_FAILURES_HEAD: Final = "# images that were not loaded; `ociproxy load` accepts this list\n"


class Report(Watcher):
    """Keeps what is needed for the end: the failures, and how often whatever else happened."""

    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        self._screen = screen
        self._json = as_json
        self._began = time.monotonic()
        self._waited: dict[str, tuple[float, float]] = {}
        self.failures: list[tuple[Wanted, OciProxyError]] = []
        self._loaded: set[Reference] = set()

    def loaded(self, result: Result) -> None:
        image = result.image
        self._loaded.add(image.reference)
        reference, digest = image.reference, image.top.descriptor.digest
        if self._json:
            print_event(
                "loaded",
                reference=str(reference),
                digest=str(digest),
                platforms=[str(platform) for platform in image.platforms],
                lacking=[str(platform) for platform in image.lacking],
                size=image.size,
                fetched=result.fetched,
                seconds=round(result.seconds, 3),
            )
            return
        lacking = ""
        if image.lacking:
            lacking = f", lacks {', '.join(map(str, image.lacking))}"
        shown = f"{reference}" if reference.digest else f"{reference}@{digest}"
        self._screen.line(
            f"loaded {shown} {decimal(image.size)}, {decimal(result.fetched)} fetched, "
            f"{result.seconds:.1f} s{lacking}"
        )

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self.failures.append((wanted, error))
        if self._json:
            print_event("failed", **_failure(wanted, error))
        else:
            hint = ""
            if isinstance(error, UpstreamRateLimited):
                hint = f"; wait {error.retry_after:g} s, or raise --pull-timeout"
            self._screen.line(f"failed {wanted.reference} ({wanted.place}): {error}{hint}")

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        now = time.monotonic()
        said, until = self._waited.get(error.upstream, (-_QUIET, 0.0))
        if now < max(said + _QUIET, until) and now + seconds <= until + _QUIET:
            return
        self._waited[error.upstream] = now, now + seconds
        if self._json:
            print_event("waiting", upstream=error.upstream, seconds=seconds, reason=error.reason)
        else:
            self._screen.line(f"waiting {round(seconds, 1):g} s: {error}")

    def note(self, text: str) -> None:
        """Something that is no failure and should be known."""
        if self._json:
            print_event("note", text=text)
        else:
            self._screen.line(text)

    def end(self, summary: Summary, *, interrupted: bool) -> None:
        seconds = time.monotonic() - self._began
        if self._json:
            print_event(
                "done",
                loaded=summary.loaded,
                failed=summary.failed,
                untried=summary.untried,
                fetched=summary.fetched,
                seconds=round(seconds, 3),
                interrupted=interrupted,
                failures=[_failure(wanted, error) for wanted, error in self.failures],
            )
            return
        parts = [f"{summary.loaded} loaded"]
        if summary.failed:
            parts.append(f"{summary.failed} failed")
        if summary.untried:
            parts.append(f"{summary.untried} not finished")
        text = f"{', '.join(parts)}; {decimal(summary.fetched)} fetched in {seconds:.1f} s"
        if interrupted:
            text += "; interrupted: run it again to go on"
        elif summary.exit_code == TRANSIENT:
            text += "; what failed may pass: run it again"
        self._screen.line(text)

    def failure_list(self, wanted: list[Wanted]) -> str:
        """A list of all that is not loaded, with the reasons."""
        lines = [f"{image}  # {_one_line(error)}\n" for image, error in self.failures]
        ended = self._loaded | {image.reference for image, _ in self.failures}
        lines += [f"{each}  # not finished\n" for each in wanted if each.reference not in ended]
        return _FAILURES_HEAD + "".join(lines)


def _failure(wanted: Wanted, error: OciProxyError) -> dict[str, object]:
    return {
        "reference": str(wanted.reference),
        "place": wanted.place,
        "error": type(error).__name__,
        "reason": str(error),
        "transient": error.exit_code == TRANSIENT,
    }


def _one_line(error: OciProxyError) -> str:
    return " ".join(str(error).split())
