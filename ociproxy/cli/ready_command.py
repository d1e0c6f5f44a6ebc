"""`ociproxy ready`: would the images of lists come up with the uplink gone?"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import click
from rich.filesize import decimal

from ociproxy.cli.options import (
    config_path,
    configuration,
    image_path,
    json_events,
    kubernetes_option,
    platform_option,
    served_store,
)
from ociproxy.cli.sources import chosen_platforms, machine_platform, read_wanted
from ociproxy.cli.table import Row, print_table
from ociproxy.cli.terminal import counted, print_event
from ociproxy.load.ready import ReadyCheck

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.load.ready import Readiness, ReadyPlatform
    from ociproxy.oci.platform import Platform

_COLUMNS: Final = ("REFERENCE", "READY", "DIGEST", "PLATFORMS", "SIZE", "WHY")
_NOT_READY: Final = 3


@click.command("ready", short_help="Say whether images would come up with the uplink gone.")
@click.argument("lists", nargs=-1, metavar="[IMAGELIST]...")
@image_path
@config_path
@kubernetes_option("Kubernetes manifests, or a rendered chart, as for load; repeat for more.")
@platform_option(
    "Platform that is needed; repeat for more.  [default: linux on this machine's processor]"
)
@click.option(
    "--all-platforms",
    is_flag=True,
    envvar="OCIPROXY_ALL_PLATFORMS",
    help="Every platform that an image has is needed.",
)
@click.option(
    "--referrers",
    is_flag=True,
    envvar="OCIPROXY_REFERRERS",
    help="Each image needs its signatures, SBOMs and attestations, at least one of them.",
)
@json_events
@click.pass_context
def ready(
    ctx: click.Context,
    lists: tuple[str, ...],
    image_path: Path | None,
    config_path: Path | None,
    manifests: tuple[str, ...],
    platforms: tuple[Platform, ...],
    all_platforms: bool,
    referrers: bool,
    as_json: bool,
) -> None:
    """Say of each image of the lists whether a client could pull it if no upstream answered; `-`
    reads standard input.

    An image is ready when its tag is known, every manifest and blob of the platforms is stored and
    on the disk, and the configuration lets the server serve it. Asks no upstream and changes
    nothing. Exits with 3 where an image is not ready.
    """
    if not (lists or manifests):
        raise click.UsageError("give an IMAGELIST, - for standard input, or --kubernetes FILE")

    def note(text: str) -> None:
        if as_json:
            print_event("note", text=text)
        else:
            click.echo(text, err=True)

    chosen = chosen_platforms(None, (), platforms, everything=all_platforms)
    default = machine_platform() if chosen is None else chosen
    wanted = read_wanted(lists, manifests, default, note=note)
    config = configuration(config_path, image_path=image_path)
    rows: list[Row] = []
    not_ready = 0
    with ExitStack() as stack:
        checking = ReadyCheck(served_store(config, stack), config, referrers=referrers)
        for each in wanted:
            found = checking.check(each)
            not_ready += not found.ready
            if as_json:
                print_event("image", **_document(found))
            else:
                rows.append(_row(found))
    if as_json:
        print_event("done", ready=len(wanted) - not_ready, notReady=not_ready)
    else:
        print_table(
            _COLUMNS,
            rows,
            numbers=("SIZE",),
            spare=("SIZE", "DIGEST"),
            folding=("PLATFORMS",),
        )
        images = counted(len(wanted), "image")
        outcome = f"{not_ready} of them not ready" if not_ready else "all ready"
        click.echo(f"{images}, {outcome}", err=True)
    ctx.exit(_NOT_READY if not_ready else 0)


def _document(found: Readiness) -> dict[str, object]:
    return {
        "reference": str(found.wanted.reference),
        "place": found.wanted.place,
        "ready": found.ready,
        "digest": None if found.digest is None else str(found.digest),
        "refusal": found.refusal,
        "platforms": [
            {
                "platform": str(each.platform or ""),
                "ready": not each.missing,
                "missing": [
                    {"digest": str(m.descriptor.digest), "reason": m.reason} for m in each.missing
                ],
            }
            for each in found.platforms
        ],
        "lacking": [str(platform) for platform in found.lacking],
        "referrers": len(found.referrers),
        "size": found.size,
    }


def _row(found: Readiness) -> Row:
    return (
        str(found.wanted.reference),
        "yes" if found.ready else "no",
        "-" if found.digest is None else found.digest.short,
        ",".join(_shown(each) for each in found.platforms) or "-",
        decimal(found.size),
        _why(found),
    )


def _shown(platform: ReadyPlatform) -> str:
    name = str(platform.platform or "-")
    return f"not {name}" if platform.missing else name


def _why(found: Readiness) -> str:
    """The first reason, and how many more there are; of an image that is ready, what it lacks."""
    if found.ready:
        return f"lacks {', '.join(map(str, found.lacking))}" if found.lacking else ""
    if found.refusal is not None:
        return found.refusal
    first, *more = found.missing
    reason = f"{first.reason} ({first.descriptor.digest.short})"
    return f"{reason}, and {len(more)} more" if more else reason
