"""What `load --plan` says: what would be fetched, and whether there is room for it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ociproxy.fetch.load import Watcher
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.cli.load_report import Report
    from ociproxy.digest import Digest
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.fetch.image import UpstreamImage
    from ociproxy.fetch.load import Result, Summary
    from ociproxy.imagelist import Wanted

_PIPE_WIDTH: Final = 10_000


class Plan(Watcher):
    """`report` says what fails, as in a load."""

    def __init__(self, report: Report, root: Path, *, as_json: bool) -> None:
        self._report = report
        self._root = root
        self._json = as_json
        self._found: list[tuple[UpstreamImage, int]] = []
        self._sizes: dict[Digest, int] = {}
        self._missing: dict[Digest, int] = {}

    def loaded(self, result: Result) -> None:
        image = result.image
        self._found.append((image, sum(result.missing.values())))
        self._sizes.update((blob.digest, blob.size) for blob in image.blobs.values())
        self._missing.update(result.missing)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._report.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        self._report.waiting(error, seconds)

    def end(self, summary: Summary, *, interrupted: bool) -> None:
        """Each image by itself, then all together with shared blobs counted once."""
        if interrupted:
            return
        self._found.sort(key=lambda each: str(each[0].reference))
        unique, new = sum(self._sizes.values()), sum(self._missing.values())
        free = _free(self._root)
        if self._json:
            document = {
                "event": "plan",
                "images": [_document(image, missing) for image, missing in self._found],
                "failed": summary.failed,
                "size": unique,
                "new": new,
                "free": free,
            }
            click.echo(json.dumps(document))
            return
        table = Table(box=None, pad_edge=False)
        for name in ("REFERENCE", "DIGEST", "PLATFORMS"):
            table.add_column(name, no_wrap=True, overflow="ignore")
        for name in ("SIZE", "NEW"):
            table.add_column(name, no_wrap=True, justify="right")
        for image, missing in self._found:
            digest = image.top.descriptor.digest
            table.add_row(
                str(image.reference),
                f"{digest.algorithm}:{digest.encoded[:12]}",
                ",".join(map(str, image.platforms)) or "-",
                decimal(image.size),
                decimal(missing),
            )
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = _PIPE_WIDTH
        console.print(table)
        enough = "" if new < free else ": NOT ENOUGH"
        failed = f", {summary.failed} failed" if summary.failed else ""
        click.echo(
            f"{summary.loaded} images{failed}: {decimal(unique)} in different blobs, "
            f"{decimal(new)} to fetch, {decimal(free)} free in {self._root}{enough}"
        )


def _document(image: UpstreamImage, missing: int) -> dict[str, object]:
    return {
        "reference": str(image.reference),
        "digest": str(image.top.descriptor.digest),
        "platforms": [str(platform) for platform in image.platforms],
        "lacking": [str(platform) for platform in image.lacking],
        "size": image.size,
        "new": missing,
    }


def _free(root: Path) -> int:
    """Bytes that this user may still write."""
    with store_errors(root):
        state = os.statvfs(root)
    return state.f_bavail * state.f_frsize
