"""`ociproxy prune`: its options, and a prune from the survey of the store to its exit code."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ociproxy import log
from ociproxy.cli.options import (
    DurationType,
    PathType,
    SizeType,
    config_path,
    configuration,
    image_path,
    json_events,
    log_format,
    quiet_log_level,
)
from ociproxy.cli.prune_report import Report
from ociproxy.cli.terminal import sigterm_as_sigint
from ociproxy.errors import StoreFull
from ociproxy.load.pins import all_pins
from ociproxy.store.limits import Limits
from ociproxy.store.pruning.carry_out import carry_out
from ociproxy.store.pruning.pins import Pins
from ociproxy.store.pruning.plan import Selection, make_plan
from ociproxy.store.pruning.survey import Survey
from ociproxy.store.store import open_existing
from ociproxy.store.usage import Usage

if TYPE_CHECKING:
    from ociproxy.store.pruning.plan import Plan, Removed

_NOT_REACHED: Final = 3
"""Exit code where what is pinned or in use keeps the store larger than it is to be."""


@click.command("prune", short_help="Remove images from the store.")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@image_path
@config_path
@quiet_log_level
@log_format
@click.option(
    "--unused-for",
    type=DurationType(),
    default=0.0,
    envvar="OCIPROXY_UNUSED_FOR",
    help="Only what no client has used for so long, such as 30d.",
)
@click.option(
    "--older-than",
    type=DurationType(),
    default=0.0,
    envvar="OCIPROXY_OLDER_THAN",
    help="Only what was stored so long ago, such as 90d.",
)
@click.option(
    "--to-size",
    type=SizeType(),
    envvar="OCIPROXY_TO_SIZE",
    help="Only the least recently used, until the store has this size, such as 200G.",
)
@click.option(
    "--to-limits",
    is_flag=True,
    envvar="OCIPROXY_TO_LIMITS",
    help="So, until store.max_size and store.min_free are kept, as a server does by itself.",
)
@click.option(
    "--unreferenced",
    is_flag=True,
    envvar="OCIPROXY_UNREFERENCED",
    help="Only images without a tag, and content that no image needs.",
)
@click.option(
    "--keep-recent",
    type=DurationType(),
    envvar="OCIPROXY_KEEP_RECENT",
    help="Never what was used within this time.  [default: store.keep_recent, else 1h]",
)
@click.option(
    "--pinned",
    metavar="FILE",
    type=PathType(),
    envvar="OCIPROXY_PINNED",
    help="An image list, as for load: its images are pinned, too.",
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    envvar="OCIPROXY_PRUNE_ALL",
    help="Yes, every image, where nothing or a pattern for all images is given.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    envvar="OCIPROXY_DRY_RUN",
    help="Only say what would be removed.",
)
@json_events
@click.pass_context
def prune(
    ctx: click.Context,
    patterns: tuple[str, ...],
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    unused_for: float,
    older_than: float,
    to_size: int | None,
    to_limits: bool,
    unreferenced: bool,
    keep_recent: float | None,
    pinned: Path | None,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove images from the store, beside a running server too.

    PATTERN is a glob on the reference, such as '*/library/*:1.*', or a name such as nginx or
    nginx:1.27: `list` shows what it means. An image is removed that fits all that is given. What an
    image that stays needs is never removed, nor what is pinned or was used a moment ago.
    """
    config = configuration(
        config_path, image_path=image_path, log_level=log_level, log_format=log_format
    )
    log.set_up(config.log.level, config.log.format)
    if to_limits and to_size is not None:
        raise click.UsageError("give --to-size or --to-limits")
    store = open_existing(config.store.path)
    before, began = store.usage.read() or Usage(), time.time()
    selection = Selection(
        patterns=patterns,
        unused_for=unused_for,
        older_than=older_than,
        to_size=to_size,
        limits=Limits.of(config.store, store.root) if to_limits else None,
        # What is promised is as good as stored: an import reads long after it was promised room.
        wanted=before.wanted + store.usage.promised(),
        unreferenced=unreferenced,
        keep_recent=config.store.keep_recent if keep_recent is None else keep_recent,
    )
    if everything:
        selection = replace(selection, patterns=tuple(filter(None, patterns)))
    elif not all(patterns) or (selection.is_unlimited and not patterns):
        raise click.UsageError("say what to remove, or --all for every image")
    report = Report(selection, before, as_json=as_json, dry_run=dry_run)
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_sigint())
        # First, so that nothing else removes what the survey sees.
        remover = None if dry_run else stack.enter_context(store.removals.remover())
        survey = Survey(store)
        pins = Pins(all_pins(store, config, pinned))
        plan = make_plan(store, survey, selection, is_pinned=pins.match, now=time.time())
        if plan.takes_all and not everything:
            raise click.UsageError("the patterns match every image of the store: say --all, too")
        done: Removed = plan
        if remover is not None:
            recent = selection.keep_recent
            done = carry_out(store, survey, plan, remover, keep_recent=recent)
            stuck: bool | None = None
            if to_limits:  # what may go by and by is no reason to wait for more
                stuck = done.freed <= plan.size // 100 and _is_too_large(selection, plan, done)
            size = plan.size - done.freed
            needed = plan.pinned_size if to_limits else None
            if remover.folder.is_dir():  # else this one has lost its turn, and the next knows more
                with suppress(StoreFull):  # then servers know nothing, and count again
                    store.usage.record(
                        size, before, freed=done.freed, stuck=stuck, pinned=needed, began=began
                    )
    # Later than that: a reader that takes no more would keep every other prune off.
    report.pins(plan.pinned, pins.unmet())
    for pattern in selection.patterns:
        if not any(image.reference.matches(pattern) for image in survey.images):
            click.echo(f"nothing matches {pattern!r}", err=True)
    report.end(plan, done)
    ctx.exit(_NOT_REACHED if _is_too_large(selection, plan, done) else 0)


def _is_too_large(selection: Selection, plan: Plan, done: Removed) -> bool:
    size = plan.size - done.freed
    if selection.limits is not None:
        return not selection.limits.are_kept(size, selection.wanted, freed=done.freed)
    return plan.target is not None and size > plan.target
