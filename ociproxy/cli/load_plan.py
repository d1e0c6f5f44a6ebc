"""What `load --plan` prints: a table of the images or one JSON event, and what all of them need.

Tests: tests/load/test_loader.py, tests/cli/test_progress.py.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.cli.load_report import withheld_layer
from ociproxy.cli.table import print_table
from ociproxy.cli.terminal import counted, print_event
from ociproxy.config.units import show_duration, show_size
from ociproxy.load.plan import Plan, PlannedImage, PlannedPulls
from ociproxy.load.progress import Watcher
from ociproxy.store.room import free_space

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ociproxy.cli.load_report import Report
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.progress import Result, Summary

_PLAN_COLUMNS: Final = ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "NEW")


class PlanReport(Watcher):
    """Prints what a load would fetch into the store at `root`; `report` prints the failures."""

    def __init__(
        self,
        report: Report,
        root: Path,
        room_for: Callable[[int], tuple[int, int] | None],
        *,
        as_json: bool,
    ) -> None:
        """`room_for` is told how many bytes are to come: see `capped`."""
        self._report = report
        self._root = root
        self._room_for = room_for
        self._json = as_json
        self._plan = Plan()
        self.fits = True
        """Whether the disk and the store's limit have room for all; known after `end`."""

    def loaded(self, result: Result) -> None:
        self._report.ended(result.image)
        for layer, reason in result.withheld.items():
            withheld = withheld_layer(layer.digest, reason, layer.urls)
            self._report.note(f"{result.image.reference} would be incomplete: {withheld}")
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
        capped = self._room_for(plan.new)
        self.fits = plan.new < free and (capped is None or plan.new <= capped[1])
        if self._json:
            print_event(
                "plan",
                images=[_document(image) for image in plan.images],
                failed=summary.failed,
                size=plan.size,
                new=plan.new,
                free=free,
                room=None if capped is None else capped[1],
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
        if capped is not None:
            cap, room = capped
            enough = "" if plan.new <= room else ": NOT ENOUGH"
            click.echo(
                f"store.max_size ({show_size(cap)}) leaves room for {decimal(room)}, once all has "
                f"been removed that may be{enough}"
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
        image.digest.short,
        ",".join(map(str, image.platforms)) or "-",
        decimal(image.size),
        decimal(image.new),
    )
