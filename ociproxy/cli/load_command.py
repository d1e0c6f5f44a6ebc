"""`ociproxy load`: its options, and the order in which a load is prepared, run and reported.

Tests: tests/load/test_loader.py, tests/cli/test_load_lock.py, tests/load/test_interrupted.py.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy import log
from ociproxy.cli.backends import BACKENDS, backends
from ociproxy.cli.load_report import Report
from ociproxy.cli.load_run import LoadRun, leave
from ociproxy.cli.options import (
    config_path,
    configuration,
    image_path,
    json_events,
    kubernetes_option,
    log_format,
    pin_option,
    platform_option,
    pull_timeout,
    quiet_log_level,
    verbose,
)
from ociproxy.cli.screen import Screen
from ociproxy.cli.server_client import AdminListener, server_auth_option
from ociproxy.cli.sources import chosen_platforms, machine_platform, read_wanted
from ociproxy.cli.terminal import INTERRUPTED, check_target, write_file
from ociproxy.errors import ConfigError, IntegrityError, NoRoom
from ociproxy.store.store import Store, is_store, temporary_store

if TYPE_CHECKING:
    from ociproxy.cli.load_plan import PlanReport
    from ociproxy.config.settings import BackendName, Config
    from ociproxy.load.progress import Watcher
    from ociproxy.oci.platform import Platform


@click.command("load", short_help="Fill the store with the images of lists.")
@click.argument("lists", nargs=-1, metavar="[IMAGELIST]...")
@image_path
@config_path
@quiet_log_level
@log_format
@kubernetes_option(
    "Kubernetes manifests, or a rendered chart: load every image in them; repeat for more."
)
@platform_option("Platform to load; repeat for more.  [default: linux on this machine's processor]")
@click.option(
    "--arch",
    "archs",
    metavar="ARCH",
    multiple=True,
    envvar="OCIPROXY_ARCH",
    help="The same by processor, such as amd64; repeat for more.",
)
@click.option("--os", envvar="OCIPROXY_OS", help="Goes with --arch.  [default: linux]")
@click.option(
    "--all-platforms", is_flag=True, envvar="OCIPROXY_ALL_PLATFORMS", help="Load every platform."
)
@click.option(
    "--referrers",
    is_flag=True,
    envvar="OCIPROXY_REFERRERS",
    help="Load signatures, SBOMs and attestations too.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    envvar="OCIPROXY_JOBS",
    help="Images that may be loading at once.  [default: load.jobs, else 8]",
)
@pull_timeout
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    envvar="OCIPROXY_BACKEND",
    help="What fetches from all upstreams, whatever the file says.",
)
@click.option(
    "--plan",
    is_flag=True,
    envvar="OCIPROXY_PLAN",
    help="Only say what would be loaded: sizes, new bytes, free disk. Stores nothing.",
)
@click.option(
    "--lock",
    "lock",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="OCIPROXY_LOCK",
    help="Write here which digests the tags stood for, once all images are known.",
)
@click.option(
    "--locked",
    is_flag=True,
    envvar="OCIPROXY_LOCKED",
    help="Obey the lock instead: ask for no tag. Without a list, load all that it has.",
)
@click.option(
    "--fail-fast",
    is_flag=True,
    envvar="OCIPROXY_FAIL_FAST",
    help="Begin no further image once one has failed.",
)
@click.option(
    "--failures",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="OCIPROXY_FAILURES",
    help="Write what was not loaded here, as a list to load.",
)
@pin_option
@click.option(
    "--server",
    "server",
    metavar="URL",
    envvar="OCIPROXY_SERVER",
    help="Have the server load them whose admin listener is there, into its store.",
)
@server_auth_option
@json_events
@verbose
@click.pass_context
def load(
    ctx: click.Context,
    lists: tuple[str, ...],
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    manifests: tuple[str, ...],
    platforms: tuple[Platform, ...],
    archs: tuple[str, ...],
    os: str | None,
    all_platforms: bool,
    referrers: bool,
    jobs: int | None,
    pull_timeout: float | None,
    backend: BackendName | None,
    plan: bool,
    lock: Path | None,
    locked: bool,
    fail_fast: bool,
    failures: Path | None,
    pin: bool,
    server: str | None,
    server_auth: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Fill the store with the images of lists; `-` reads standard input.

    A list has one reference a line; `#` begins a comment, and `platform=OS/ARCH` may follow a
    reference. What is stored already is not fetched again, so an interrupted load goes on where it
    stopped.
    """
    if locked and lock is None:
        raise click.UsageError("--locked obeys a lock: give --lock FILE")
    if not (lists or manifests or locked):
        raise click.UsageError("give an IMAGELIST, - for standard input, or --kubernetes FILE")
    if server is not None:
        from ociproxy.cli.load_server import check_options  # few have a server load

        check_options(ctx)
    screen = Screen()
    report = Report(screen, as_json=as_json, verbose=verbose)
    chosen = chosen_platforms(os, archs, platforms, everything=all_platforms)
    default = machine_platform() if chosen is None else chosen
    wanted = read_wanted(lists, manifests, default, note=report.note)
    if server is not None:
        if failures is not None:
            check_target(failures)
        from ociproxy.cli.load_server import ServerLoad

        by_server = ServerLoad(AdminListener(server, server_auth), report)
        try:
            code = by_server.run(wanted, chosen, referrers=referrers, pin=pin, fail_fast=fail_fast)
        finally:
            if failures is not None:
                write_file(failures, report.failure_list(wanted).encode())
        ctx.exit(code)
    if locked and lock is not None:
        from ociproxy.cli.load_lock import obey

        wanted = obey(lock, wanted, chosen, everything=not (lists or manifests))
        lock = None
    config = configuration(
        config_path,
        image_path=image_path,
        log_level=log_level,
        log_format=log_format,
        load={"jobs": jobs, "pull_timeout": pull_timeout},
    )
    if config.serve.offline:
        raise ConfigError("it says never to ask an upstream, and load does", key="serve.offline")
    log.set_up(config.log.level, config.log.format)
    for target in (lock, failures):
        if target is not None:
            check_target(target)
    with ExitStack() as stack:
        store, known = _stores(config, stack, plan=plan)
        outcome: Report | PlanReport = report
        planned = None
        if known is not None:
            from ociproxy.cli.capped import room_for  # few plan
            from ociproxy.cli.load_plan import PlanReport

            images = {each.reference for each in wanted}
            room = partial(room_for, known, config, images)
            outcome = planned = PlanReport(report, config.store.path, room, as_json=as_json)
        watcher: Watcher = outcome
        if pin and not plan:
            from ociproxy.cli.load_pins import PinLoaded  # few pin

            watcher = PinLoaded(store, outcome)
        writer = None
        if lock is not None:
            from ociproxy.cli.load_lock import LockWriter  # few write or read one

            watcher = writer = LockWriter(watcher)
        run = LoadRun(
            config,
            backends(store, config, everywhere=backend),
            screen,
            watcher,
            referrers=referrers,
            fail_fast=fail_fast,
        )
        try:
            if not plan and config.store.max_size is not None:
                from ociproxy.cli.capped import capped  # few stores have a limit

                stack.enter_context(capped(store, config, config_path))
            asyncio.run(run.run(store, wanted, only_find=plan, known=known))
            if lock is not None and writer is not None:
                if run.summary.loaded == len(wanted):
                    write_file(lock, writer.encode())
                else:
                    report.note(f"{lock} is not written: it would lack what is not loaded")
        except KeyboardInterrupt:
            run.interrupted = True  # the second signal: the first one cancels the work in order
        finally:
            try:
                # Before the last line is printed: printing fails if the reader of stderr has gone.
                if failures is not None:
                    write_file(failures, report.failure_list(wanted).encode())
            finally:
                outcome.end(run.summary, interrupted=run.interrupted)
    if run.interrupted:
        leave(INTERRUPTED)
    code = run.summary.exit_code
    if planned is not None and not planned.fits and code != IntegrityError.exit_code:
        code = NoRoom.exit_code
    ctx.exit(code)


def _stores(config: Config, stack: ExitStack, *, plan: bool) -> tuple[Store, Store | None]:
    """The store to load into, and for a plan what is stored already. A plan creates nothing: it
    gets stores that `stack` removes. Raises StoreError."""
    root, hot = config.store.path, config.store.hot_manifests
    if plan:
        known = Store(root, hot_manifests=hot) if is_store(root) else None
        return (
            stack.enter_context(temporary_store()),
            known or stack.enter_context(temporary_store()),
        )
    store = Store(root, hot_manifests=hot)
    store.check_writable()
    return store, None
