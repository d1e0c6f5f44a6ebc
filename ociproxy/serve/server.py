"""One process of the server: sockets, signals, the order of starting and of stopping.

Tests: tests/serve/test_shutdown.py, tests/serve/test_upstream_rules.py, tests/serve/test_tls.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.config.settings import Config
from ociproxy.fetch.engine import Engine
from ociproxy.serve.admin.server import AdminServer, admin_auth
from ociproxy.serve.api import RegistryApi
from ociproxy.serve.auth import BasicAuth
from ociproxy.serve.ending import MARGIN, end_within
from ociproxy.serve.eviction import Eviction
from ociproxy.serve.housekeeping import Housekeeper
from ociproxy.serve.listener import SIGNALS, Listener
from ociproxy.serve.live import Live
from ociproxy.serve.preload import preload
from ociproxy.serve.reload import Reloads, warn_of_restart
from ociproxy.serve.scrubbing import Scrub
from ociproxy.serve.sendfile import Senders
from ociproxy.serve.supervisor import Supervisor
from ociproxy.serve.syncing import SyncJob

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.load.imagelist import Wanted
    from ociproxy.metrics.tally import Tally
    from ociproxy.serve.housekeeping import Job, MakeCommand
    from ociproxy.store.store import Store

Setup = tuple[Config, ssl.SSLContext | None]
"""A configuration, and the TLS of its certificate files; None is plain HTTP."""

_SAME_SIGNAL: Final = 1.0
"""Seconds in which a second signal counts as the first: systemd signals every process of a service,
and the main process signals them too."""


def run(
    setup: Setup,
    store: Store,
    make_backend: Callable[[Config], MakeBackend],
    listener: socket.socket,
    reload: Callable[[], Setup],
    make_command: MakeCommand,
    wanted: Sequence[Wanted],
    supervisor: Supervisor,
    *,
    tally: Tally | None = None,
    admin: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; running responses then have `shutdown_grace` to finish.
    Meanwhile the images `wanted` are loaded, and the store is maintained by child processes.

    On SIGHUP `reload` reads the configuration and its files again; where it raises ConfigError the
    running configuration stays. Signals that the caller blocked are heard from here on. Where an
    admin listener is, this process tells `tally` what it does; with `admin` it is that listener.
    """
    with contextlib.closing(Senders()) as senders:
        asyncio.run(
            _serve(
                setup,
                store,
                make_backend,
                listener,
                reload,
                make_command,
                wanted,
                supervisor,
                senders,
                tally,
                admin,
            )
        )


async def _serve(
    setup: Setup,
    store: Store,
    make_backend: Callable[[Config], MakeBackend],
    listener: socket.socket,
    reload: Callable[[], Setup],
    make_command: MakeCommand,
    wanted: Sequence[Wanted],
    supervisor: Supervisor,
    senders: Senders,
    tally: Tally | None,
    admin: socket.socket | None,
) -> None:
    loop = asyncio.get_running_loop()
    config, context = setup
    stopping = asyncio.Event()
    retiring: set[asyncio.Task[None]] = set()

    async def replace() -> None:
        # In threads: a large configuration takes long to parse.
        fresh, fresh_context = await loop.run_in_executor(None, reload)
        fresh_auth = await loop.run_in_executor(None, _auth, fresh)
        fresh_admins = await loop.run_in_executor(None, admin_auth, fresh)
        room = store.room.within(fresh.store)
        engine = Engine(store, fresh, make_backend(fresh), room=room)
        main_port.use(fresh.serve, fresh_context)
        if admin_server is not None:
            admin_server.use(fresh, fresh_admins)
        for each in keepers:
            each.use(fresh)
        task = loop.create_task(api.replace(engine, fresh, fresh_auth))
        retiring.add(task)
        task.add_done_callback(retiring.discard)
        warn_of_restart(config, fresh)

    reloads = Reloads(replace, supervisor)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloads.request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    auth = await loop.run_in_executor(None, _auth, config)
    room = store.room.within(config.store)
    engine = Engine(store, config, make_backend(config), room=room)
    api = RegistryApi(engine, config, auth, senders)
    main_port = Listener(listener, api, config.serve, context)
    main_port.open()
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.serve.tls is None else "https"
    where = store.root.absolute()
    log.event(logging.INFO, "listening", scheme=scheme, host=host, port=port, store=where)
    jobs: list[Job] = [Eviction(store, config), SyncJob(store, config), Scrub(store, config)]
    keepers = [Housekeeper(store, job, make_command, config) for job in jobs]
    for each in keepers:
        each.start()
    await loop.run_in_executor(None, supervisor.ready)
    background: set[asyncio.Task[None]] = {asyncio.create_task(_stay_alive(supervisor))}
    admin_server: AdminServer | None = None
    if tally is not None:
        live = Live(tally, api, main_port)
        live.tell()
        background.add(asyncio.create_task(live.run()))
        if admin is not None:
            admins = await loop.run_in_executor(None, admin_auth, config)
            admin_server = AdminServer(admin, config, store, tally, make_command, admins)
            admin_server.open()
    background.add(asyncio.create_task(reloads.run()))
    preloading = asyncio.create_task(preload(store, config, make_backend(config), wanted))
    await stopping.wait()
    supervisor.stopping()
    children = [loop.run_in_executor(None, each.stop) for each in keepers]
    if admin_server is not None:
        admin_server.stop_loads()
    await _finish(main_port, config.serve.shutdown_grace)
    # No response is running any more: nothing that still comes is of use to a client.
    end_within(MARGIN)
    if admin_server is not None:
        await admin_server.close()
    ending = {preloading, *background, *retiring}
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, *children, api.close(), return_exceptions=True)
    log.event(logging.INFO, "stopped")


async def _stay_alive(supervisor: Supervisor) -> None:
    """A loop that hangs sends nothing: the supervisor then starts the server anew."""
    while supervisor.interval is not None:
        supervisor.alive()
        await asyncio.sleep(supervisor.interval)


async def _finish(main_port: Listener, grace: float) -> None:
    """Accept no more clients. Running responses may finish until the grace is over or a second
    signal comes; those that have not are cut."""
    loop = asyncio.get_running_loop()
    log.event(logging.INFO, "stopping", grace=grace)
    # Whatever happens below, the process ends when the operator expects it.
    end_within(grace + MARGIN)
    began = loop.time()
    main_port.stop_accepting()
    finishing = asyncio.create_task(main_port.finish())

    def hurry() -> None:
        if loop.time() - began >= _SAME_SIGNAL:
            finishing.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hurry)
    await asyncio.wait({finishing}, timeout=grace)
    finishing.cancel()
    await main_port.cut()


def _auth(config: Config) -> BasicAuth | None:
    """Blocks: it reads a file. Raises ConfigError."""
    if config.serve.auth is None:
        return None
    if config.serve.tls is None:
        log.event(logging.WARNING, "passwords of clients travel unencrypted without serve.tls")
    return BasicAuth(config.serve.auth)
