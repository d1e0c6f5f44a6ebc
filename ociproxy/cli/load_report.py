"""What `load` and `load --plan` print: a line an image or JSON events, and the outcome at the end.

Tests: tests/load/test_loader.py, tests/cli/test_progress.py.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.cli.table import print_table
from ociproxy.cli.terminal import counted, print_event, short
from ociproxy.config.units import show_duration
from ociproxy.errors import UpstreamRateLimited
from ociproxy.load.loader import Watcher
from ociproxy.load.plan import Plan, PlannedImage, PlannedPulls
from ociproxy.store.limits import free_space

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.cli.screen import Screen
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.image import UpstreamImage
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.loader import Result
    from ociproxy.load.progress import Summary
    from ociproxy.oci.reference import Reference

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
        self.failures: list[tuple[Wanted, OciProxyError]] = []
        self._loaded: set[Reference] = set()

    def loaded(self, result: Result) -> None:
        image = result.image
        self.ended(image)
        reference, digest = image.reference, image.top.descriptor.digest
        if self._json:
            print_event(
                "loaded",
                reference=str(reference),
                digest=str(digest),
                platforms=[str(platform) for platform in image.platforms],
                lacking=[str(platform) for platform in image.lacking],
                withheld=[{"digest": str(e.digest), "urls": e.urls} for e in result.withheld],
                size=image.size,
                fetched=result.fetched,
                seconds=round(result.seconds, 3),
            )
            return
        lacking = f", lacks {', '.join(map(str, image.lacking))}" if image.lacking else ""
        named = digest if self._verbose else short(digest)
        shown = f"{reference}" if reference.digest else f"{reference}@{named}"
        self._screen.line(
            f"loaded {shown} {decimal(image.size)}, {decimal(result.fetched)} fetched, "
            f"{result.seconds:.1f} s{lacking}"
        )
        for layer in result.withheld:
            where = f"; it may be at {layer.urls[0]}" if layer.urls else ""
            self._screen.line(
                f"  incomplete: the registry does not have the non-distributable layer "
                f"{layer.digest}{where}"
            )

    def ended(self, image: UpstreamImage) -> None:
        """This image is no failure, and not unfinished."""
        self._loaded.add(image.reference)
        if image.refused:
            refused = counted(
                len(image.refused),
                "referrer or signature tag was refused, and is",
                "referrers or signature tags were refused, and are",
            )
            self.note(f"{image.reference}: {refused} left out: {image.refused[0]}")

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
            print_event(
                "waiting", upstream=error.upstream, seconds=round(seconds, 3), reason=error.reason
            )
        else:
            self._screen.line(f"waiting {round(seconds, 1):g} s: {error}")

    def note(self, text: str) -> None:
        """Print something that the user should know and that is no failure."""
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
        elif summary.transient:
            text += "; what failed may pass: run it again"
        self._screen.line(text)

    def failure_list(self, wanted: list[Wanted]) -> str:
        """An image list of what was not loaded; the reason is a comment on each line."""
        lines = [f"{image}  # {' '.join(str(error).split())}\n" for image, error in self.failures]
        ended = self._loaded | {image.reference for image, _ in self.failures}
        lines += [f"{each}  # not finished\n" for each in wanted if each.reference not in ended]
        return _FAILURES_HEAD + "".join(lines)


def _failure(wanted: Wanted, error: OciProxyError) -> dict[str, object]:
    return {
        "reference": str(wanted.reference),
        "place": wanted.place,
        "error": type(error).__name__,
        "reason": str(error),
        "transient": error.transient,
    }


class PlanReport(Watcher):
    """Prints what a load would fetch into the store at `root`; `report` prints the failures."""

    def __init__(self, report: Report, root: Path, *, as_json: bool) -> None:
        self._report = report
        self._root = root
        self._json = as_json
        self._plan = Plan()
        self.fits = True
        """Whether the disk has room for all; known after `end`."""

    def loaded(self, result: Result) -> None:
        self._report.ended(result.image)
        self._plan.add(result.image, result.missing)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._report.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        self._report.waiting(error, seconds)

    def end(self, summary: Summary, *, interrupted: bool) -> None:
        """Print each image, then all of them together with shared blobs counted once."""
        if interrupted:
            self._report.end(summary, interrupted=True)
            return
        plan, free = self._plan, free_space(self._root)
        pulls = plan.pulls(summary.quotas)
        self.fits = plan.new < free
        if self._json:
            print_event(
                "plan",
                images=[_document(image) for image in plan.images],
                failed=summary.failed,
                size=plan.size,
                new=plan.new,
                free=free,
                pulls=[dataclasses.asdict(each) for each in pulls],
            )
            return
        print_table(
            _PLAN_COLUMNS,
            map(_row, plan.images),
            numbers=("SIZE", "NEW"),
            spare=("DIGEST",),
            folding=("PLATFORMS",),
        )
        enough = "" if plan.new < free else ": NOT ENOUGH"
        failed = f", {summary.failed} failed" if summary.failed else ""
        click.echo(
            f"{counted(summary.loaded, 'image')}{failed}: {decimal(plan.size)} in different blobs, "
            f"{decimal(plan.new)} to fetch, {decimal(free)} free in {self._root}{enough}"
        )
        for each in pulls:
            click.echo(_quota(each))


def _document(image: PlannedImage) -> dict[str, object]:
    return {
        "reference": str(image.reference),
        "digest": str(image.digest),
        "platforms": [str(platform) for platform in image.platforms],
        "lacking": [str(platform) for platform in image.lacking],
        "size": image.size,
        "new": image.new,
    }


def _quota(pulls: PlannedPulls) -> str:
    window = "" if pulls.window is None else f" in {show_duration(pulls.window)}"
    enough = "" if pulls.needed <= pulls.remaining else ": NOT ENOUGH"
    return (
        f"{pulls.registry}: {counted(pulls.needed, 'pull')}, {pulls.remaining} left "
        f"of {pulls.limit}{window}{enough}"
    )


def _row(image: PlannedImage) -> tuple[str, ...]:
    return (
        str(image.reference),
        short(image.digest),
        ",".join(map(str, image.platforms)) or "-",
        decimal(image.size),
        decimal(image.new),
    )
