"""`ociproxy check`: its options, and the check from its start to its exit code."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from ociproxy.cli.check_report import Report
from ociproxy.cli.options import SizeType, config_path, existing_store, image_path, json_events
from ociproxy.cli.screen import Screen
from ociproxy.cli.terminal import INTERRUPTED, Step
from ociproxy.store.check import Findings, check
from ociproxy.store.damage import JOBS, FileCheck


@click.command("check", short_help="Verify the store by hash.")
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
    image_path: Path | None,
    config_path: Path | None,
    quick: bool,
    rate: int | None,
    jobs: int,
    as_json: bool,
) -> None:
    """Hash each blob and manifest of the store, and follow each tag, record and referrer.

    Says which files are damaged and which images need them, and which images lack something.
    Changes nothing, and may run beside a server. Exits with 5 where something is damaged, with 3
    where something is missing.
    """
    screen = Screen()
    report = Report(screen, as_json=as_json)
    store = existing_store(config_path, image_path)
    files = FileCheck(store, jobs=jobs, rate=rate, quick=quick)
    size = files.size()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    findings: Findings | None = None
    try:
        with screen.watching_work(lambda: Step("all", "check", files.read, size)):
            files.run()
            findings = check(store, files.damaged, files.unsealed)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    interrupted = findings is None
    report.store(str(store.root), files, findings)
    report.end(interrupted=interrupted)
    ctx.exit(INTERRUPTED if interrupted else report.exit_code)
