"""`ociproxy check`: its options, and the check from its start to its exit code."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy.cli.check_report import Report
from ociproxy.cli.options import SizeType, config_path, existing_store, image_path, json_events
from ociproxy.cli.screen import Screen
from ociproxy.cli.terminal import INTERRUPTED, Step
from ociproxy.errors import LayoutInvalid
from ociproxy.store.check import Findings, check
from ociproxy.store.damage import JOBS, FileCheck, Throttle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.store.store import Store


@click.command("check", short_help="Verify the store, or archives, by hash.")
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...", type=click.Path(path_type=Path))
@image_path
@config_path
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
@json_events
@click.pass_context
def check_command(
    ctx: click.Context,
    archives: tuple[Path, ...],
    image_path: Path | None,
    config_path: Path | None,
    quick: bool,
    rate: int | None,
    jobs: int,
    as_json: bool,
) -> None:
    """Hash each blob and manifest of the store, and follow each tag, record and referrer.

    Says which files are damaged and which images need them, and which images lack something.
    Changes nothing, and may run beside a server. With ARCHIVE the same of what `import` reads:
    archives, with all their volumes, and folders. Exits with 5 where something is damaged, with 3
    where something is missing.
    """
    if archives and quick:
        raise click.UsageError("--quick looks at seals, which an archive has not: leave it out")
    for path in archives:
        if (path / "store.json").is_file():
            raise click.UsageError(f"{path} is a store: say so with --image-path")
    screen = Screen()
    report = Report(screen, as_json=as_json)
    with _interruptible():
        if archives:
            interrupted = not _check_archives(archives, rate, screen, report)
        else:
            store = existing_store(config_path, image_path)
            files = FileCheck(store, jobs=jobs, rate=rate, quick=quick)
            interrupted = not _check_store(store, files, screen, report)
    report.end(interrupted=interrupted)
    ctx.exit(INTERRUPTED if interrupted else report.exit_code)


def _check_store(store: Store, files: FileCheck, screen: Screen, report: Report) -> bool:
    """Report what is found; False where it was interrupted."""
    findings: Findings | None = None
    try:
        size = files.size()
        with screen.watching_work(lambda: Step("all", "check", files.read, size)):
            files.run()
            findings = check(store, files.damaged, files.unsealed)
    except KeyboardInterrupt:
        pass
    report.store(str(store.root), files, findings)
    return findings is not None


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
                    report.failed(str(volumes[0]), exc)
    except KeyboardInterrupt:
        return False
    return True


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the check in order, as SIGINT does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
