"""`ociproxy load`."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ociproxy import log
from ociproxy.cli.backends import BACKENDS, backends
from ociproxy.cli.load_report import Report, overall, steps
from ociproxy.cli.options import (
    config_path,
    configuration,
    image_path,
    log_format,
    pull_timeout,
    quiet_log_level,
)
from ociproxy.cli.plan_report import Plan
from ociproxy.cli.progress import Screen
from ociproxy.cli.sources import chosen_platforms, read_wanted
from ociproxy.fetch.engine import Engine
from ociproxy.fetch.load import Loader
from ociproxy.store.store import Store

if TYPE_CHECKING:
    from ociproxy.config.settings import BackendName, Config
    from ociproxy.imagelist import Wanted

_INTERRUPTED: Final = 130


@click.command("load")
@click.argument("lists", nargs=-1, metavar="[IMAGELIST]...")
@image_path
@config_path
@quiet_log_level
@log_format
@click.option(
    "--kubernetes",
    "manifests",
    metavar="FILE",
    multiple=True,
    envvar="OCIPROXY_KUBERNETES",
    help="Kubernetes manifests, or a rendered chart: load every image in them; repeat for more.",
)
@click.option(
    "--platform",
    "platforms",
    metavar="OS/ARCH[/VARIANT]",
    multiple=True,
    envvar="OCIPROXY_PLATFORM",
    help="Platform to load; repeat for more.  [default: linux on this machine's processor]",
)
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
    "--fail-fast", is_flag=True, envvar="OCIPROXY_FAIL_FAST", help="Stop at the first failure."
)
@click.option(
    "--failures",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="OCIPROXY_FAILURES",
    help="Write what was not loaded here, as a list to load.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="OCIPROXY_JSON",
    help="Print an event a line, as JSON, and the outcome as the last.",
)
@click.pass_context
def load(
    ctx: click.Context,
    lists: tuple[str, ...],
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    manifests: tuple[str, ...],
    platforms: tuple[str, ...],
    archs: tuple[str, ...],
    os: str | None,
    all_platforms: bool,
    referrers: bool,
    jobs: int | None,
    pull_timeout: float | None,
    backend: BackendName | None,
    plan: bool,
    fail_fast: bool,
    failures: Path | None,
    as_json: bool,
) -> None:
    """Fill the store with the images of lists; `-` reads standard input.

    A list has one reference a line; `#` begins a comment, and `platform=OS/ARCH` may follow a
    reference. What is stored already is not fetched again, so an interrupted load goes on where it
    stopped.
    """
    if not lists and not manifests:
        raise click.UsageError("give an IMAGELIST, - for standard input, or --kubernetes FILE")
    screen = Screen()
    report = Report(screen, as_json=as_json)
    chosen = chosen_platforms(os, archs, platforms, everything=all_platforms)
    wanted = read_wanted(lists, manifests, chosen, note=report.note)
    config = configuration(
        config_path,
        image_path=image_path,
        log_level=log_level,
        log_format=log_format,
        load={"jobs": jobs, "pull_timeout": pull_timeout},
    )
    log.set_up(config.log.level, config.log.format)
    store = Store(config.store.path, hot_manifests=config.store.hot_manifests)
    store.check_writable()
    run = _Run(config, store, screen, report, backend=backend, referrers=referrers, as_json=as_json)
    work = run.plan(wanted) if plan else run.load(wanted, failures, fail_fast=fail_fast)
    ctx.exit(asyncio.run(work))


class _Run:
    """One load, from the engine's start to its end."""

    def __init__(
        self,
        config: Config,
        store: Store,
        screen: Screen,
        report: Report,
        *,
        backend: BackendName | None,
        referrers: bool,
        as_json: bool,
    ) -> None:
        # The loader itself waits out what may pass: an upstream is never left alone for long.
        pause = min(config.fetch.pause, config.fetch.retry_wait_max)
        self._config = replace(config, fetch=replace(config.fetch, pause=pause))
        self._store = store
        self._screen = screen
        self._report = report
        self._backend = backend
        self._referrers = referrers
        self._as_json = as_json

    async def load(self, wanted: list[Wanted], failures: Path | None, *, fail_fast: bool) -> int:
        engine = self._engine()
        loader = Loader(
            engine, self._config, self._report, referrers=self._referrers, fail_fast=fail_fast
        )
        interrupted = False
        working = asyncio.create_task(loader.run(wanted))
        _interruptible(working)
        try:
            async with self._screen.watching(
                lambda: overall(loader, len(wanted)), lambda: steps(loader)
            ):
                await asyncio.wait([working])
                if working.cancelled():
                    interrupted = True
                else:
                    working.result()
        finally:
            await engine.close()
            if failures is not None:
                _write(failures, self._report.failure_list(wanted))
            self._report.end(loader.summary, interrupted=interrupted)
        return _INTERRUPTED if interrupted else loader.summary.exit_code

    async def plan(self, wanted: list[Wanted]) -> int:
        engine = self._engine()
        plan = Plan(self._report)
        loader = Loader(engine, self._config, plan, referrers=self._referrers)
        working = asyncio.create_task(loader.find(wanted))
        _interruptible(working)
        try:
            await asyncio.wait([working])
        finally:
            await engine.close()
        if working.cancelled():
            return _INTERRUPTED
        plan.show(working.result(), self._store.root, as_json=self._as_json)
        return loader.summary.exit_code

    def _engine(self) -> Engine:
        return Engine(self._store, self._config, backends(self._config, everywhere=self._backend))


def _interruptible(work: asyncio.Task[object]) -> None:
    """SIGINT and SIGTERM end the work in order; a second one ends everything."""
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
