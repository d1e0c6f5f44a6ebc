"""`ociproxy serve`: the store, bundles, TLS, listener and workers put together.

Tests: tests/serve/test_shutdown.py, tests/serve/test_preload.py, tests/archive/test_bundle.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from socket import socket

import click

from ociproxy import log
from ociproxy.archive.bundle import Bundle
from ociproxy.archive.volumes import grouped
from ociproxy.cli.backends import backends
from ociproxy.cli.child import command_maker
from ociproxy.cli.environment import misspelt
from ociproxy.cli.memory import keep_pieces
from ociproxy.cli.options import common, configuration, pull_timeout
from ociproxy.cli.sources import machine_platform, read_wanted
from ociproxy.config.settings import Config
from ociproxy.errors import ConfigError, StoreError
from ociproxy.load.imagelist import Wanted
from ociproxy.load.pins import configured_pins
from ociproxy.metrics.counters import share
from ociproxy.serve.admin.server import admin_socket, serve_admin
from ociproxy.serve.listener import listen
from ociproxy.serve.server import Setup, run
from ociproxy.serve.supervisor import Supervisor
from ociproxy.serve.tls import server_context
from ociproxy.serve.workers import Work, run_workers
from ociproxy.store.store import Store, is_store, temporary_store


@click.command()
@common
@click.option("--host", envvar="OCIPROXY_HOST", help="Where to listen.  [default: 0.0.0.0]")
@click.option(
    "--port",
    envvar="OCIPROXY_PORT",
    type=click.IntRange(0, 65535),
    help="0 lets the kernel choose.  [default: 8080]",
)
@click.option(
    "--admin-port",
    envvar="OCIPROXY_ADMIN_PORT",
    type=click.IntRange(0, 65535),
    help="The port for the page, metrics, probes and the admin API; 0 turns it off.  "
    "[default: 8081]",
)
@click.option(
    "--offline",
    envvar="OCIPROXY_OFFLINE",
    is_flag=True,
    default=None,
    help="Never contact an upstream.",
)
@click.option(
    "--workers",
    envvar="OCIPROXY_WORKERS",
    type=click.IntRange(1, 64),
    help="Processes that share the port and the store.  [default: 1]",
)
@click.option(
    "--preload-images",
    envvar="OCIPROXY_PRELOAD_IMAGES",
    type=click.Path(path_type=Path),
    help="An image list, as for load: load them while serving.",
)
@pull_timeout
@click.option(
    "--bundle",
    "bundles",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    envvar="OCIPROXY_BUNDLE",
    help="An archive to serve from as it is, under the store; repeat for more.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    host: str | None,
    port: int | None,
    admin_port: int | None,
    offline: bool | None,
    workers: int | None,
    preload_images: Path | None,
    pull_timeout: float | None,
    bundles: tuple[Path, ...],
) -> None:
    """Serve the mirror until SIGTERM."""

    def read() -> Config:
        config = configuration(
            config_path,
            image_path=image_path,
            log_level=log_level,
            log_format=log_format,
            admin={"port": admin_port, "chosen": None if admin_port is None else True},
            serve={
                "host": host,
                "port": port,
                "offline": offline,
                "workers": workers,
                "preload_images": preload_images,
                "bundles": bundles or None,
            },
            load={"pull_timeout": pull_timeout},
        )
        for _ in configured_pins(config):  # a list that cannot be read would end every prune
            pass
        return config

    def reread() -> Setup:
        fresh = read()
        return fresh, server_context(fresh.serve)

    keep_pieces()
    supervisor = Supervisor()
    config = read()
    log.set_up(config.log.level, config.log.format)
    for line in misspelt(ctx.find_root()):
        log.event(logging.WARNING, "misspelt variable", reason=line)
    wanted: list[Wanted] = []
    if config.serve.preload_images is not None:
        wanted = read_wanted([str(config.serve.preload_images)], [], machine_platform())
    with ExitStack() as stack:
        opened = [stack.enter_context(Bundle(path)) for path in config.serve.bundles]
        for bundle in opened:
            log.event(logging.INFO, "bundle opened", path=bundle.path, images=bundle.images)
            if bundle.left_out:
                name, reason = bundle.left_out[0]
                log.event(
                    logging.WARNING,
                    "images of a bundle not served",
                    path=bundle.path,
                    images=len(bundle.left_out),
                    first=name,
                    reason=reason,
                )
        # Raises ConfigError unless all volumes of each set are given.
        grouped({bundle.path: bundle.label for bundle in opened})
        store = _store(config, opened, stack)
        if config.serve.offline:
            # No upstream can send what a bundle made with `--since` left out.
            for bundle in opened:
                _warn_of_absent_base(bundle, store)
        else:
            # An offline mirror fetches nothing, so that it may serve a read-only store.
            store.check_writable()

        # Made before the workers fork, so that they share the keys of TLS session tickets.
        context = server_context(config.serve)
        listener = stack.enter_context(
            listen(config.serve.host, config.serve.port, client_stall=config.serve.client_stall)
        )
        admin = admin_socket(config)
        if admin is not None:
            stack.enter_context(admin)
        workers = config.serve.workers
        make_command = command_maker(config_path)
        # The leader has the first row, the workers the next ones, the admin process the last.
        tally = share(1 if workers == 1 else workers + 2)

        def setup(*, again: bool) -> Setup:
            # A process that replaces a dead one reads the configuration anew; if that is wrong, the
            # configuration of the start stays.
            if again:
                try:
                    return reread()
                except ConfigError as exc:
                    log.event(logging.ERROR, "configuration not reloaded", reason=exc)
            return config, context

        def work(row: int = 0, *, again: bool = False) -> None:
            if row:
                tally.use(row)
                if admin is not None:
                    admin.close()
            run(
                setup(again=again),
                store,
                partial(backends, store),
                listener,
                reread,
                make_command,
                wanted,
                supervisor,
                tally=None if admin is None else tally,
                admin=None if row else admin,
            )

        def work_admin(port: socket, *, again: bool) -> None:
            tally.use(workers + 1)
            listener.close()
            config = setup(again=again)[0]
            asyncio.run(serve_admin(config, store, port, tally, make_command, read))

        if workers == 1:
            work()
        else:
            works: list[Work] = [partial(work, row) for row in range(1, workers + 1)]
            listeners = [listener]
            if admin is not None:
                works.append(partial(work_admin, admin))
                listeners.append(admin)
            run_workers(works, supervisor, listeners=listeners, grace=config.serve.shutdown_grace)


def _warn_of_absent_base(bundle: Bundle, store: Store) -> None:
    absent = [digest for digest in bundle.base if store.blobs.find_size(digest) is None]
    if absent:
        log.event(
            logging.WARNING,
            "bundle without its base",
            path=bundle.path,
            missing=len(absent),
            digest=absent[0],
        )


def _store(config: Config, bundles: list[Bundle], stack: ExitStack) -> Store:
    """The store over the bundles. Offline, bundles are enough: where there is no store, and none
    can be made, an empty temporary one takes its place. Raises StoreError."""
    root, hot = config.store.path, config.store.hot_manifests
    if not (config.serve.offline and bundles) or is_store(root):
        return Store(root, hot_manifests=hot, below=bundles)
    try:
        return Store(root, hot_manifests=hot, below=bundles)
    except StoreError as exc:
        log.event(logging.INFO, "serving bundles alone", reason=exc)
        return stack.enter_context(temporary_store(below=bundles))
