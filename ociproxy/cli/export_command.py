"""`ociproxy export`: its options, the choice of images, and what it prints.

Tests: tests/archive/export/test_export.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.archive.export.export import Exported, Shape, check_target, export, size_of
from ociproxy.archive.export.output import STDOUT
from ociproxy.archive.export.selection import by_lock, by_patterns, by_references, flatten, reach
from ociproxy.archive.lock import read_lock, read_lock_file
from ociproxy.cli.options import (
    SizeType,
    config_path,
    existing_store,
    image_path,
    platform_option,
)
from ociproxy.cli.screen import Screen
from ociproxy.cli.sources import read_wanted
from ociproxy.cli.terminal import Step, counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ociproxy.archive.export.selection import Chosen, Selected
    from ociproxy.oci.platform import Platform
    from ociproxy.store.store import Store

_STDOUT_NUMBER: Final = 1


@click.command("export", short_help="Write cached images into an archive.")
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
@platform_option(
    "Take only this platform of an index; repeat for more.  [default: all that are stored]"
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
    help="Leave out the blobs that this lock or archive has.",
)
@click.option(
    "--volume-size",
    type=SizeType(),
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
    "--force",
    is_flag=True,
    envvar="OCIPROXY_FORCE",
    help="Overwrite an archive of other content, and a file that is no archive.",
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
    force: bool,
    as_json: bool,
) -> None:
    """Write cached images into FILE, an archive to carry; no network is used.

    PATTERN is a glob on the reference, such as '*/library/*:1.*'. '-' is standard output.
    """
    if sum(map(bool, (patterns, lists, locked))) > 1:
        raise click.UsageError("patterns, --list and --lock exclude each other: give one of them")
    screen = Screen()
    wanted = read_wanted(lists, [], platforms, note=lambda text: _warn(screen, text))
    shape = Shape(
        flattened=style == "oci",
        digest_names=digest_names,
        since=None if since is None else read_lock(since),
        volume_size=volume_size,
        zstd=zstd,
    )
    check_target(file, shape)
    if file == STDOUT and os.isatty(_STDOUT_NUMBER):
        raise click.UsageError("an archive is nothing for a terminal: give a file, or a pipe")
    store = existing_store(config_path, image_path)
    selected: Iterable[Selected] = by_patterns(
        store, patterns, platforms, lambda text: _warn(screen, text)
    )
    if wanted:
        selected = by_references(store, ((each.reference, each.platforms) for each in wanted))
    elif locked is not None:
        selected = by_lock(read_lock_file(locked), platforms)
    with store.reading() as keep:
        chosen = reach(store, selected, referrers=not no_referrers, allow_partial=allow_partial)
        if shape.flattened:
            chosen = list(flatten(store, chosen, referrers=not no_referrers))
        for image in chosen:
            keep(image.contents.manifests, image.contents.blobs)
        exported = _export(screen, store, chosen, file, shape, force=force)
    _report(screen, file, chosen, exported, as_json=as_json)


def _export(
    screen: Screen,
    store: Store,
    chosen: list[Chosen],
    file: Path,
    shape: Shape,
    *,
    force: bool,
) -> Exported:
    written, size = 0, size_of(chosen, shape)

    def progress(count: int) -> None:
        nonlocal written
        written += count

    with screen.watching_work(lambda: Step("all", "export", written, size)):
        return export(store, chosen, file, shape, force=force, progress=progress)


def _report(
    screen: Screen, file: Path, chosen: list[Chosen], exported: Exported, *, as_json: bool
) -> None:
    for warning in exported.warnings:
        _warn(screen, warning)
    if as_json:
        click.echo(json.dumps(_document(chosen, exported), indent=1), err=file == STDOUT)
        return
    for written in exported.files:
        screen.line(f"{written.digest}  {written.path}  {decimal(written.size)}")
    omitted = f", {decimal(exported.omitted)} left out" if exported.omitted else ""
    images = counted(len(chosen), "image")
    screen.line(f"{images}, {exported.contents} manifests and blobs{omitted}")


def _warn(screen: Screen, text: str) -> None:
    screen.line(f"Warning: {text}")


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
        "incomplete": [str(each.reference) for each in chosen if not each.contents.complete],
        "warnings": list(exported.warnings),
    }
