"""What `prune` prints: a line for each image, or JSON events, and a summary at the end.

Tests: tests/cli/test_prune_command.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ociproxy.cli.terminal import counted, print_event
from ociproxy.config.units import show_duration, show_size, utc_time
from ociproxy.store.files import digest_of
from ociproxy.store.pruning.carry_out import Pruned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ociproxy.store.pruning.pins import Pin
    from ociproxy.store.pruning.plan import Plan, Removed, Selection
    from ociproxy.store.pruning.stored import StoredFile
    from ociproxy.store.pruning.survey import SurveyedImage
    from ociproxy.store.usage import Usage


class Report:
    def __init__(self, selection: Selection, usage: Usage, *, as_json: bool, dry_run: bool) -> None:
        """`usage` was read before."""
        self._selection = selection
        self._usage = usage
        self._json = as_json
        self._dry_run = dry_run

    def pins(self, images: list[SurveyedImage], unmet: list[Pin]) -> None:
        """Say which images are pinned, but would not come up without an upstream."""
        problems = [(str(e.reference), "incomplete") for e in images if not e.complete]
        problems += [(pin.pattern, "not stored") for pin in unmet]
        for name, status in problems:
            if self._json:
                print_event("pinned", reference=name, status=status)
            else:
                click.echo(f"warning: {name} is pinned, but {status}", err=True)

    def end(self, plan: Plan, done: Removed) -> None:
        """`done` is what was removed: of a dry run, the plan itself."""
        kept = done.kept if isinstance(done, Pruned) else []
        if self._json:
            self._print_events(plan, done, kept)
        else:
            self._print_lines(plan, done, kept)

    def _print_events(self, plan: Plan, done: Removed, kept: list[SurveyedImage]) -> None:
        for images, status in ((done.images, "removed"), (kept, "kept")):
            for image in images:
                print_event(
                    "image",
                    reference=str(image.reference),
                    digest=str(image.digest),
                    status=status,
                    size=image.size,
                    lastUsed=utc_time(image.used),
                    **({"cause": plan.cause} if plan.cause else {}),
                )
        for kind, name, each in _content(done):
            print_event("content", kind=kind, digest=str(digest_of(name) or name), size=each.size)
        print_event(
            "done",
            images=len(done.images),
            manifests=len(done.manifests),
            blobs=len(done.blobs),
            rubbish=len(done.rubbish),
            freed=done.freed,
            size=plan.size - done.freed,
            target=plan.target,
            cause=plan.cause,
            wanted=self._selection.wanted,
            kept={
                "pinned": plan.pinned_fit,
                "recent": plan.recent,
                "reading": plan.reading,
                "recentFiles": plan.recent_files,
                "usedMeanwhile": len(kept),
            },
            dryRun=self._dry_run,
        )

    def _print_lines(self, plan: Plan, done: Removed, kept: list[SurveyedImage]) -> None:
        from rich.filesize import decimal

        verb = "would remove" if self._dry_run else "removed"
        for image in done.images:
            name = str(image.reference)
            shown = name if image.reference.digest else f"{name}@{image.digest}"
            click.echo(f"{verb} {shown}, last used {utc_time(image.used)}")
        for image in kept:
            click.echo(f"kept {image.reference}: used or stored again meanwhile")
        parts = [
            counted(len(items), name)
            for items, name in (
                (done.images, "image"),
                (done.manifests, "manifest"),
                (done.blobs, "blob"),
                (done.rubbish, "abandoned or damaged file"),
            )
            if items
        ]
        left = f"{decimal(plan.size - done.freed)} stay"
        click.echo(f"{verb} {', '.join(parts) or 'nothing'}: {decimal(done.freed)}; {left}")
        for line in (*self._limits(plan), *self._reasons(plan)):
            click.echo(line)

    def _limits(self, plan: Plan) -> Iterator[str]:
        """What `--to-limits` is to reach, and why."""
        from rich.filesize import decimal

        limits, wanted, usage = self._selection.limits, self._selection.wanted, self._usage
        if limits is None:
            return
        waiting = f"; downloads wait for room for {decimal(wanted)}" if wanted else ""
        if plan.target is None:
            cap = "" if limits.max_size is None else f" of {show_size(limits.max_size)}"
            free = f", {decimal(limits.free)} of the disk are free" if limits.total else ""
            yield f"the limits are kept: {decimal(plan.size)}{cap} stored{free}{waiting}"
        else:
            yield f"{plan.cause} wants the store at {decimal(plan.target)}{waiting}"
        if usage.stuck:
            unmet = f", room for {decimal(usage.unmet)} was wanted" if usage.unmet else ""
            yield f"since {utc_time(usage.stuck)} downloads pass through: nothing could go{unmet}"

    def _reasons(self, plan: Plan) -> Iterator[str]:
        """Why there is more that fits, and stays."""
        recent = show_duration(self._selection.keep_recent)
        needed = "arriving, or needed by a load, an import or an export"
        for count, one, many, reason in (
            (plan.recent, "was", "were", f"used or stored within {recent}"),
            (plan.pinned_fit, "is", "are", "pinned"),
            (plan.reading, "is", "are", needed),
        ):
            if count:
                stay = counted(count, f"image stays that {one}", f"images stay that {many}")
                yield f"{stay} {reason}"
        if plan.recent_files:
            stay = counted(plan.recent_files, "file stays", "files stay")
            yield f"{stay} that no image needs yet: used or stored a moment ago"


def _content(done: Removed) -> Iterator[tuple[str, str, StoredFile]]:
    for kind, found in (("manifest", done.manifests), ("blob", done.blobs)):
        for name in sorted(found):
            yield kind, name, found[name]
    for each in _by_path(done.rubbish):
        yield "rubbish", each.path.name, each


def _by_path(files: Iterable[StoredFile]) -> list[StoredFile]:
    return sorted(files, key=lambda each: each.path)
