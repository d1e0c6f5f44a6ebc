"""`ociproxy diff`: what it prints, and its exit code.

Tests: tests/archive/test_diff.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.archive.diff import Difference, diff, open_lock
from ociproxy.cli.terminal import printable

if TYPE_CHECKING:
    from ociproxy.archive.lock import LockedImage
    from ociproxy.oci.digest import Digest

_DIFFERENT: Final = 1


@click.command("diff", short_help="Print what moved between stores or archives.")
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--json", "as_json", is_flag=True, envvar="OCIPROXY_JSON", help="Print one JSON object."
)
@click.pass_context
def diff_command(context: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Print how B differs from A, and how much of B a store that has A lacks.

    A and B are each a store's folder, an archive or a lock. Exits with 1 where they differ.
    """
    found = diff(open_lock(first), open_lock(second))
    if as_json:
        click.echo(json.dumps(_document(found), indent=1))
    else:
        _print(found)
    if found:
        context.exit(_DIFFERENT)


def _print(found: Difference) -> None:
    for image in found.added:
        click.echo(f"+ {image.reference}  {_short(image)}")
    for image in found.removed:
        click.echo(f"- {image.reference}  {_short(image)}")
    for old, new in found.moved:
        click.echo(f"~ {new.reference}  {_short(old)} -> {_short(new)}")
    for old, new in found.changed:
        click.echo(printable(f"~ {new.reference}  {_state(old)} -> {_state(new)}"))
    if not found:
        click.echo("no difference")
        return
    click.echo(
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.moved)} moved, "
        f"{len(found.changed)} changed; {decimal(sum(found.carry.values()))} to carry "
        f"in {len(found.carry)} manifests and blobs"
    )


def _document(found: Difference) -> dict[str, object]:
    return {
        "different": bool(found),
        "added": [image.to_json() for image in found.added],
        "removed": [image.to_json() for image in found.removed],
        "moved": [
            {
                "reference": str(new.reference),
                "from": str(old.descriptor.digest),
                "to": str(new.descriptor.digest),
            }
            for old, new in found.moved
        ],
        "changed": [
            {"reference": str(new.reference), "from": old.to_json(), "to": new.to_json()}
            for old, new in found.changed
        ],
        "carry": _contents(found.carry),
        "dropped": _contents(found.dropped),
    }


def _contents(sizes: dict[Digest, int]) -> dict[str, object]:
    listed = [{"digest": str(digest), "size": size} for digest, size in sizes.items()]
    return {"bytes": sum(sizes.values()), "contents": listed}


def _short(image: LockedImage) -> str:
    return image.descriptor.digest.short


def _state(image: LockedImage) -> str:
    platforms = ",".join(map(str, image.platforms)) or "no platform"
    return platforms if image.complete else f"{platforms} (incomplete)"
