"""What `load --plan` says: what would be fetched, and whether there is room for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.cli.printing import print_event, short
from ociproxy.cli.tables import print_table
from ociproxy.load.loader import Watcher
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.cli.load_report import Report
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.loader import Result, Summary
    from ociproxy.oci.digest import Digest

_COLUMNS: Final = ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "NEW")


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of an image; sizes are bytes, `new` those of blobs that are not stored."""

    reference: str
    digest: Digest
    platforms: tuple[str, ...]
    lacking: tuple[str, ...]
    size: int
    new: int

    def to_json(self) -> dict[str, object]:
        return {
            "reference": self.reference,
            "digest": str(self.digest),
            "platforms": self.platforms,
            "lacking": self.lacking,
            "size": self.size,
            "new": self.new,
        }

    def to_text(self) -> tuple[str, ...]:
        return (
            self.reference,
            short(self.digest),
            ",".join(self.platforms) or "-",
            decimal(self.size),
            decimal(self.new),
        )


class Plan(Watcher):
    """`report` says what fails, as in a load."""

    def __init__(self, report: Report, root: Path, *, as_json: bool) -> None:
        self._report = report
        self._root = root
        self._json = as_json
        self._rows: list[_Row] = []
        self._sizes: dict[Digest, int] = {}
        self._missing: dict[Digest, int] = {}

    def loaded(self, result: Result) -> None:
        image = result.image
        self._rows.append(
            _Row(
                str(image.reference),
                image.top.descriptor.digest,
                tuple(map(str, image.platforms)),
                tuple(map(str, image.lacking)),
                image.size,
                sum(result.missing.values()),
            )
        )
        self._sizes.update((blob.digest, blob.size) for blob in image.blobs.values())
        self._missing.update(result.missing)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._report.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        self._report.waiting(error, seconds)

    def end(self, summary: Summary, *, interrupted: bool) -> None:
        """Each image by itself, then all together with shared blobs counted once."""
        if interrupted:
            self._report.end(summary, interrupted=True)
            return
        self._rows.sort(key=lambda row: row.reference)
        unique, new = sum(self._sizes.values()), sum(self._missing.values())
        free = _free(self._root)
        if self._json:
            print_event(
                "plan",
                images=[row.to_json() for row in self._rows],
                failed=summary.failed,
                size=unique,
                new=new,
                free=free,
            )
            return
        print_table(_COLUMNS, (row.to_text() for row in self._rows), numbers=("SIZE", "NEW"))
        enough = "" if new < free else ": NOT ENOUGH"
        failed = f", {summary.failed} failed" if summary.failed else ""
        click.echo(
            f"{summary.loaded} images{failed}: {decimal(unique)} in different blobs, "
            f"{decimal(new)} to fetch, {decimal(free)} free in {self._root}{enough}"
        )


def _free(root: Path) -> int:
    """Bytes that this user may still write."""
    with store_errors(root):
        state = os.statvfs(root)
    return state.f_bavail * state.f_frsize
