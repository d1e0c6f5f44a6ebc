"""`ociproxy export`."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from ociproxy.archive.export import Exported, Shape, check_target, export, size_of
from ociproxy.archive.output import STDOUT
from ociproxy.archive.selection import by_lock, by_patterns, by_references, flatten, reach
from ociproxy.archive.source import read_lock, read_lock_file
from ociproxy.cli.options import config_path, configuration, image_path
from ociproxy.cli.sources import read_wanted
from ociproxy.errors import NameInvalid
from ociproxy.platform import Platform
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ociproxy.archive.selection import Chosen, Wish

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class _Size(click.ParamType[int]):
    """Bytes, `700M`, `4.7G` or `4GiB`."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 700M, 4.7G or 4GiB", param, ctx)
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.lower()])


class _Platform(click.ParamType[Platform]):
    name = "platform"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Platform:
        if isinstance(value, Platform):
            return value
        try:
            return Platform.parse(str(value))
        except NameInvalid as exc:
            self.fail(str(exc), param, ctx)


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@image_path
@config_path
@click.option(
    "--list",
    "lists",
    metavar="FILE",
    multiple=True,
    envvar="OCIPROXY_LIST",
    help="Take the images of a list, as for load; repeat for more.",
)
@click.option(
    "--lock",
    "locked",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="OCIPROXY_LOCK",
    help="Take what a lock names, by its digests.",
)
@click.option(
    "--platform",
    "platforms",
    type=_Platform(),
    metavar="OS/ARCH[/VARIANT]",
    multiple=True,
    envvar="OCIPROXY_PLATFORM",
    help="Of indexes, only this platform; repeat for more.  [default: all that is stored]",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["cache", "oci"]),
    default="cache",
    show_default=True,
    envvar="OCIPROXY_FORMAT",
    help="Keep indexes as upstream made them, or flatten them for other tools.",
)
@click.option(
    "--digest-names",
    is_flag=True,
    envvar="OCIPROXY_DIGEST_NAMES",
    help="Name each image by digest too.",
)
@click.option(
    "--no-referrers",
    is_flag=True,
    envvar="OCIPROXY_NO_REFERRERS",
    help="Leave out stored signatures, SBOMs and such.",
)
@click.option(
    "--since",
    metavar="LOCK|ARCHIVE",
    type=click.Path(path_type=Path),
    envvar="OCIPROXY_SINCE",
    help="Leave out the blobs that are in this one.",
)
@click.option(
    "--volume-size",
    type=_Size(),
    envvar="OCIPROXY_VOLUME_SIZE",
    help="Split into files of at most this size, such as 4.7G.",
)
@click.option(
    "--zstd", is_flag=True, envvar="OCIPROXY_ZSTD", help="Compress; FILE has to end in .zst."
)
@click.option(
    "--allow-partial",
    is_flag=True,
    envvar="OCIPROXY_ALLOW_PARTIAL",
    help="Take incomplete images too; the lock says what they lack.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="OCIPROXY_JSON",
    help="Print one JSON object at the end.",
)
def export_command(
    file: Path,
    patterns: tuple[str, ...],
    image_path: Path | None,
    config_path: Path | None,
    lists: tuple[str, ...],
    locked: Path | None,
    platforms: tuple[Platform, ...],
    style: str,
    digest_names: bool,
    no_referrers: bool,
    since: Path | None,
    volume_size: int | None,
    zstd: bool,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Write what is cached into FILE, an archive to carry; no network.

    PATTERN is a glob on the reference, such as '*/library/*:1.*'. '-' is standard output.
    """
    if sum(map(bool, (patterns, lists, locked))) > 1:
        raise click.UsageError("patterns, --list and --lock exclude each other: give one of them")
    wanted = read_wanted(lists, [], platforms, note=_warn)
    shape = Shape(
        flattened=style == "oci",
        digest_names=digest_names,
        since=None if since is None else read_lock(since),
        volume_size=volume_size,
        zstd=zstd,
    )
    check_target(file, shape)
    root = configuration(config_path, image_path=image_path).store.path
    store = open_existing(root)
    wishes: Iterable[Wish] = by_patterns(store, patterns, platforms)
    if wanted:
        wishes = by_references(store, ((each.reference, each.platforms) for each in wanted))
    elif locked is not None:
        wishes = by_lock(read_lock_file(locked), platforms)
    chosen = reach(store, wishes, referrers=not no_referrers, allow_partial=allow_partial)
    if shape.flattened:
        chosen = list(flatten(store, chosen, referrers=not no_referrers))
    with _bar(size_of(chosen, shape)) as progress:
        exported = export(store, chosen, file, shape, progress=progress)
    _report(file, chosen, exported, as_json=as_json)


def _report(file: Path, chosen: list[Chosen], exported: Exported, *, as_json: bool) -> None:
    for warning in exported.warnings:
        _warn(warning)
    if as_json:
        click.echo(json.dumps(_document(chosen, exported), indent=1), err=file == STDOUT)
        return
    for written in exported.files:
        click.echo(f"{written.digest}  {written.path}  {decimal(written.size)}", err=True)
    omitted = f", {decimal(exported.omitted)} left out" if exported.omitted else ""
    images = "1 image" if len(chosen) == 1 else f"{len(chosen)} images"
    click.echo(f"{images}, {exported.contents} manifests and blobs{omitted}", err=True)


def _warn(text: str) -> None:
    click.echo(f"Warning: {text}", err=True)


def _document(chosen: list[Chosen], exported: Exported) -> dict[str, object]:
    return {
        "files": [
            {
                "path": str(each.path),
                "size": each.size,
                "digest": str(each.digest),
                "tarDigest": str(each.tar_digest),
            }
            for each in exported.files
        ],
        "images": len(chosen),
        "contents": exported.contents,
        "size": exported.size,
        "omitted": exported.omitted,
        "lock": str(exported.lock.digest),
        "incomplete": [str(each.reference) for each in chosen if not each.closure.complete],
        "warnings": list(exported.warnings),
    }


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    if not console.is_terminal or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("export", total=total)
        yield lambda count: bars.advance(task, count)
