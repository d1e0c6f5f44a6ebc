"""`ociproxy list`: what is cached, as a table, as JSON or as references."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import click
from rich.filesize import decimal

from ociproxy.cli.options import config_path, existing_store, image_path
from ociproxy.cli.table import print_table
from ociproxy.cli.terminal import short
from ociproxy.store.image import ReachedImage
from ociproxy.store.inventory import Entry, inventory

_COLUMNS = ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "COMPLETE", "RESOLVED", "LAST USED")


@click.command("list", short_help="Print what is cached.")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
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
    patterns: tuple[str, ...], image_path: Path | None, config_path: Path | None, style: str
) -> None:
    """Print what is cached; PATTERN is a glob on the reference, such as '*/library/*:1.*'."""
    store = existing_store(config_path, image_path)
    entries = [e for e in inventory(store) if _matches(str(e.reference), patterns)]
    if style == "refs":
        for entry in entries:
            click.echo(str(entry.reference))
    elif style == "json":
        click.echo(json.dumps([_document(entry) for entry in entries], indent=1))
    else:
        print_table(
            _COLUMNS,
            map(_row, entries),
            numbers=("SIZE",),
            spare=("DIGEST", "RESOLVED", "LAST USED"),
            folding=("PLATFORMS", "COMPLETE"),
        )
        _warn(entries)


def _matches(reference: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(reference, pattern) for pattern in patterns)


def _document(entry: Entry) -> dict[str, object]:
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
        "resolved": _time(entry.resolved),
        "lastUsed": _time(entry.last_used),
    }


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.reference),
        short(entry.digest),
        ",".join(_platform(image) or "-" for image in entry.images) or "-",
        decimal(entry.size),
        _completeness(entry),
        _time(entry.resolved) or "-",
        _time(entry.last_used) or "-",
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
        verb = "image lacks" if lacking == 1 else "images lack"
        click.echo(
            f"warning: {lacking} {verb} attestations (unattested), which Docker 29.1 and newer "
            "pulls with the image: without the upstream its pull fails. "
            "`ociproxy load --referrers` stores them.",
            err=True,
        )


def _platform(image: ReachedImage) -> str:
    return str(image.platform or "")


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
