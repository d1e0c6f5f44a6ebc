"""`ociproxy list`: what is cached, as a table, as JSON or as references."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.filesize import decimal

from ociproxy.cli.options import config_path, existing_store, image_path
from ociproxy.cli.table import print_table
from ociproxy.cli.terminal import counted, printable
from ociproxy.config.units import utc_time
from ociproxy.store.image import ReachedImage
from ociproxy.store.inventory import Entry, inventory
from ociproxy.store.look import Look
from ociproxy.store.store import is_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.archive.importer.results import ImportResult
    from ociproxy.errors import OciProxyError
    from ociproxy.oci.digest import Digest

_COLUMNS = ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "COMPLETE", "RESOLVED", "LAST USED")


@click.command("list", short_help="Print what is cached.")
@click.argument("words", nargs=-1, metavar="[PATTERN|FILE]...")
@image_path
@config_path
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "refs"]),
    default="table",
    show_default=True,
    help="How to print: for people, for programs, or as a list of references.",
)
def list_command(
    words: tuple[str, ...], image_path: Path | None, config_path: Path | None, style: str
) -> None:
    """Print what is cached; PATTERN is a glob on the reference, such as '*/library/*:1.*', or a
    name as in a list of images, such as nginx or nginx:1.27.

    With FILE, an archive or a folder that import reads, print what is in there instead; every byte
    of it is read.
    """
    files = [Path(word) for word in words if os.path.exists(word)]  # noqa: PTH110 may be a glob
    patterns = [word for word in words if Path(word) not in files]
    look: Look | None = None
    if files:
        found = _found_in(files)
    else:
        store = existing_store(config_path, image_path)
        look = Look(store)
        found = inventory(store, look)
    entries: list[Entry] = []
    contents: dict[Digest, int] = {}
    unused = set(patterns)
    for entry in found:
        matching = [pattern for pattern in patterns if entry.reference.matches(pattern)]
        unused.difference_update(matching)
        if matching or not patterns:
            contents.update(entry.contents)
            entries.append(replace(entry, contents={}))
    if style == "refs":
        for entry in entries:
            click.echo(str(entry.reference))
    elif style == "json":
        click.echo(json.dumps([document(entry) for entry in entries], indent=1))
    else:
        print_table(
            _COLUMNS,
            map(_row, entries),
            numbers=("SIZE",),
            spare=("DIGEST", "RESOLVED", "LAST USED"),
            folding=("PLATFORMS", "COMPLETE"),
        )
        _total(entries, sum(contents.values()))
        _warn(entries)
    for path, reason in look.unreadable.items() if look else ():
        click.echo(f"warning: {path} cannot be read: {reason}. See `ociproxy check`", err=True)
    for pattern in sorted(unused):
        click.echo(f"nothing matches {pattern!r}", err=True)


def _found_in(files: list[Path]) -> Iterator[Entry]:
    # Imported only for a file: reading one takes much that a store needs not.
    from ociproxy.archive.check import entries_of

    for path in files:
        if is_store(path):
            raise click.UsageError(f"{path} is a store: say so with --image-path")
    return entries_of(files, _Notes())


class _Notes:
    """Prints what an import would leave out."""

    def image(self, result: ImportResult) -> None:
        if result.problems:
            self.note(result.source, f"{result.name} {result.status}: {result.problems[0]}")

    def note(self, source: str, text: str) -> None:
        click.echo(printable(f"{source}: {text}"), err=True)

    def failed(self, source: str, error: OciProxyError) -> None:
        raise error


def _total(entries: list[Entry], size: int) -> None:
    """On standard error, as all that is no row of the table."""
    broken = sum(not entry.complete for entry in entries)
    incomplete = f", {broken} of them incomplete" if broken else ""
    images = counted(len(entries), "image")
    click.echo(f"{images}{incomplete}: {decimal(size)} in different contents", err=True)


def document(entry: Entry) -> dict[str, object]:
    """As `--format json` tells it."""
    return {
        "reference": str(entry.reference),
        "digest": str(entry.digest),
        "platforms": [
            {"platform": _platform(i), "digest": str(i.digest), "complete": i.complete}
            for i in entry.images
        ],
        "size": entry.size,
        "complete": entry.complete,
        "missing": [
            {"digest": str(each.descriptor.digest), "reason": each.reason} for each in entry.missing
        ],
        "unstoredAttestations": [str(digest) for digest in entry.unstored_attestations],
        "resolved": utc_time(entry.resolved),
        "lastUsed": utc_time(entry.last_used),
    }


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.reference),
        entry.digest.short,
        ",".join(_platform(image) or "-" for image in entry.images) or "-",
        decimal(entry.size),
        _completeness(entry),
        utc_time(entry.resolved) or "-",
        utc_time(entry.last_used) or "-",
    )


def _completeness(entry: Entry) -> str:
    if entry.complete:
        return "yes, unattested" if entry.unstored_attestations else "yes"
    broken = [_platform(image) for image in entry.images if not image.complete]
    return ",".join(f"not {platform}" for platform in broken if platform) or "no"


def _warn(entries: list[Entry]) -> None:
    """On standard error: an operator who pipes the table on sees it too."""
    lacking = sum(entry.complete and bool(entry.unstored_attestations) for entry in entries)
    if lacking:
        images = counted(lacking, "image lacks", "images lack")
        click.echo(
            f"warning: {images} attestations (unattested), which Docker 29.1 and newer "
            "pulls with the image: without the upstream its pull fails. "
            "`ociproxy load --referrers` stores them.",
            err=True,
        )


def _platform(image: ReachedImage) -> str:
    return str(image.platform or "")
