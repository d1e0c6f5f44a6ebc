"""`ociproxy check`: its options, and the check from its start to its exit code."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy import log
from ociproxy.cli.check_passes import Progress
from ociproxy.cli.check_passes import scrub as scrub_store
from ociproxy.cli.check_report import Report
from ociproxy.cli.options import (
    SizeType,
    config_path,
    configuration,
    image_path,
    json_events,
    log_format,
    quiet_log_level,
)
from ociproxy.cli.screen import Screen
from ociproxy.cli.terminal import INTERRUPTED, Step, sigterm_as_sigint
from ociproxy.errors import LayoutInvalid
from ociproxy.store.check import Findings, check, check_quickly
from ociproxy.store.damage import JOBS, FileCheck, Throttle
from ociproxy.store.passes import START
from ociproxy.store.store import is_store, open_existing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store


@click.command("check", short_help="Verify the store, or archives, by hash.")
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...", type=click.Path(path_type=Path))
@image_path
@config_path
@quiet_log_level
@log_format
@click.option(
    "--quick",
    is_flag=True,
    envvar="OCIPROXY_QUICK",
    help="Read no blob: look at sizes and seals, and name the blobs without a seal.",
)
@click.option(
    "--rate",
    type=SizeType(),
    metavar="SIZE",
    envvar="OCIPROXY_RATE",
    help="Read at most so many bytes a second, such as 20M.  [default: no limit]",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=JOBS,
    envvar="OCIPROXY_JOBS",
    help="Files that may be hashed at once.  [default: processors, 8 at most]",
)
@click.option(
    "--resume",
    is_flag=True,
    envvar="OCIPROXY_RESUME",
    help="Remember how far it came, and begin where a check with --resume was interrupted.",
)
@click.option(
    "--scrub",
    is_flag=True,
    envvar="OCIPROXY_SCRUB",
    help="Hash what is due of the pass that store.scrub asks for, and repair what is damaged, as a "
    "server does.",
)
@click.option(
    "--repair",
    is_flag=True,
    envvar="OCIPROXY_REPAIR",
    help="Move what is damaged to quarantine/, fetch it and what is missing again, and remove "
    "records that lead nowhere.",
)
@click.option(
    "--offline",
    is_flag=True,
    default=None,
    envvar="OCIPROXY_OFFLINE",
    help="With --repair: ask no upstream.  [default: serve.offline]",
)
@json_events
@click.pass_context
def check_command(
    ctx: click.Context,
    archives: tuple[Path, ...],
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    quick: bool,
    rate: int | None,
    jobs: int,
    resume: bool,
    scrub: bool,
    repair: bool,
    offline: bool | None,
    as_json: bool,
) -> None:
    """Hash each blob and manifest of the store, and follow each tag, record and referrer.

    Says which files are damaged and which images need them, and which images lack something.
    Changes nothing without --repair, and may run beside a server. With ARCHIVE the same of what
    `import` reads: archives, with all their volumes, and folders. Exits with 5 where something is
    damaged, with 3 where something is missing.
    """
    if archives and (quick or resume or scrub or repair):
        raise click.UsageError("--quick, --resume, --scrub and --repair are for a store")
    if quick and (resume or repair):
        raise click.UsageError("--resume and --repair need every file hashed: leave --quick out")
    if scrub and (quick or resume or repair or rate):
        raise click.UsageError("--scrub resumes and repairs anyway: give no other such option")
    for path in archives:
        if is_store(path):
            raise click.UsageError(f"{path} is a store: say so with --image-path")
    screen = Screen()
    report = Report(screen, as_json=as_json)
    config = configuration(
        config_path,
        image_path=image_path,
        log_level=log_level,
        log_format=log_format,
        serve={"offline": offline},
    )
    log.set_up(config.log.level, config.log.format)
    with sigterm_as_sigint():
        if archives:
            whole = _check_archives(archives, rate, screen, report)
        else:
            store = open_existing(config.store.path)
            if repair or resume or scrub:
                store.check_writable()
            if scrub:
                whole = scrub_store(store, config, screen, report, as_json=as_json)
            else:
                progress = Progress(store, "check") if resume else None
                first = START if progress is None else progress.found.position
                files = FileCheck(
                    store, jobs=jobs, rate=rate, quick=quick, take_out=repair, first=first
                )
                findings = _check_store(store, files, screen, report, progress)
                whole = findings is not None
                if repair and findings is not None:
                    whole = _repair(store, config, findings, screen, report, as_json=as_json)
                if progress is not None and whole:
                    progress.end()
    report.end(interrupted=not whole)
    if not whole and (repair or scrub):
        from ociproxy.cli.load_run import leave

        leave(INTERRUPTED)
    ctx.exit(report.exit_code if whole else INTERRUPTED)


def _check_store(
    store: Store, files: FileCheck, screen: Screen, report: Report, progress: Progress | None
) -> Findings | None:
    """Report what is found, and return it; None where it was interrupted."""
    findings: Findings | None = None
    try:
        size = files.size()
        with screen.watching_work(lambda: Step("all", "check", files.read, size)):
            if files.quick:
                findings = check_quickly(store, files)
            else:
                if progress is None:
                    files.run()
                else:
                    if part := progress.found.part:
                        report.resumed(part)
                    progress.run(files)
                findings = check(store, files.damaged)
    except KeyboardInterrupt:
        pass
    report.store(str(store.root), files, findings)
    return findings


def _repair(
    store: Store,
    config: Config,
    findings: Findings,
    screen: Screen,
    report: Report,
    *,
    as_json: bool,
) -> bool:
    """Repair what was found, and report what is left; False where it was interrupted."""
    # Imported only for a repair: what fetches takes much that a check needs not.
    from ociproxy.cli.backends import backends
    from ociproxy.cli.check_repair import repair

    try:
        if findings:
            make_backend = backends(store, config)
            asyncio.run(repair(store, config, make_backend, findings, screen, as_json=as_json))
            findings = check(store, {})
    except KeyboardInterrupt:
        return False
    report.repaired(findings)
    return True


def _check_archives(
    archives: Sequence[Path], rate: int | None, screen: Screen, report: Report
) -> bool:
    """Report what is found in each; False where it was interrupted."""
    # Imported only for an archive: reading one takes much that a store needs not.
    from ociproxy.archive.check import ArchiveCheck

    checking = ArchiveCheck(Throttle(rate))
    try:
        groups = checking.groups(archives)
        with screen.watching_work(lambda: Step("all", "check", checking.consumed, checking.size)):
            for volumes in groups:
                try:
                    report.archive(checking.check(volumes))
                except LayoutInvalid as exc:
                    report.unreadable(str(volumes[0]), exc)
    except KeyboardInterrupt:
        return False
    return True
