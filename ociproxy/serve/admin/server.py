"""The admin listener: its socket, its limits, and the process that it has beside several workers.

With one worker it is served in that worker's event loop. With several it has a process of its own,
which the main process starts and replaces as it does a worker.

Tests: tests/serve/admin/test_listener.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import signal
from typing import TYPE_CHECKING

from ociproxy import log
from ociproxy.errors import AddressInUse
from ociproxy.serve.admin.api import AdminApi
from ociproxy.serve.admin.explaining import Explainer
from ociproxy.serve.admin.history import INTERVAL, History, Sample
from ociproxy.serve.admin.loading import Loads
from ociproxy.serve.admin.sources import Sources
from ociproxy.serve.admin.survey import Surveyor
from ociproxy.serve.auth import BasicAuth
from ociproxy.serve.ending import MARGIN, end_within
from ociproxy.serve.listener import SIGNALS, Listener, listen
from ociproxy.serve.reload import Reloads

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ociproxy.config.local_settings import Serve
    from ociproxy.config.settings import Config
    from ociproxy.metrics.tally import Tally
    from ociproxy.serve.housekeeping import MakeCommand
    from ociproxy.store.store import Store


def admin_socket(config: Config) -> socket.socket | None:
    """The listening socket; None where it is turned off, or its port is taken and the operator did
    not choose it. Raises AddressInUse."""
    admin = config.serve.admin
    if admin.port == 0:
        return None
    try:
        return listen(admin.host, admin.port, client_stall=config.serve.client_stall)
    except AddressInUse as exc:
        if admin.chosen:
            raise
        log.event(
            logging.WARNING,
            "no admin listener",
            reason=exc,
            hint="serve.admin.port sets another port, and 0 turns it off",
        )
        return None


class AdminServer:
    """Belongs to one event loop. Answers from `open` until `close`."""

    def __init__(
        self,
        listener: socket.socket,
        config: Config,
        store: Store,
        tally: Tally,
        make_command: MakeCommand,
        auth: BasicAuth | None,
    ) -> None:
        self._socket = listener
        self._tally = tally
        self._surveyor = Surveyor(make_command, config, tally)
        self._history = History()
        self._loads = Loads(make_command, config)
        self._sampling: asyncio.Task[None] | None = None
        loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        explainer = Explainer(config, store, tally)
        sources = Sources(store, tally, self._surveyor, self._history, explainer)
        self._api = AdminApi(config, sources, self._loads, auth, loopback=loopback)
        limits = _limits(config.serve)
        self._listener = Listener(listener, self._api, limits, None, newest_first=True)
        self._warn(auth, loopback=loopback)

    def open(self) -> None:
        self._listener.open()
        self._surveyor.start()
        self._sampling = asyncio.create_task(self._sample())
        host, port = self._socket.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        log.event(
            logging.INFO, "admin listener", url=f"http://{name}:{port}/", host=host, port=port
        )

    def use(self, config: Config, auth: BasicAuth | None) -> None:
        """A new configuration; host and port stay."""
        self._listener.use(_limits(config.serve), None)
        self._api.use(config, auth)
        self._surveyor.use(config)
        self._loads.use(config)

    def stop_loads(self) -> None:
        """The server will stop. Returns at once."""
        self._loads.stop()

    async def close(self) -> None:
        """Answers that are running are cut, but those of loads end with these."""
        self._listener.stop_accepting()
        self._loads.stop()
        self._surveyor.close()
        if self._sampling is not None:
            self._sampling.cancel()
        await self._loads.close()
        await self._listener.cut()
        self._api.close()

    async def _sample(self) -> None:
        while True:
            survey = self._surveyor.held
            stored = sum(each.bytes for each in survey.held.values()) if survey else None
            self._history.add(Sample.of(self._tally.totals(), stored))
            await asyncio.sleep(INTERVAL)

    @staticmethod
    def _warn(auth: BasicAuth | None, *, loopback: bool) -> None:
        if loopback:
            return
        reason = "serve.admin.auth is not set: every client that reaches it may read it"
        if auth is not None:
            reason = "its passwords travel unencrypted"
        log.event(logging.WARNING, "admin listener beyond this machine", reason=reason)


def admin_auth(config: Config) -> BasicAuth | None:
    """Blocks: it reads a file. Raises ConfigError."""
    auth = config.serve.admin.auth
    return None if auth is None else BasicAuth(auth)


def _limits(serve: Serve) -> Serve:
    """Of connections to the admin listener: no TLS, and its own number."""
    return dataclasses.replace(
        serve, connections=serve.admin.connections, networks=(), tls=None, auth=None
    )


async def serve_admin(
    config: Config,
    store: Store,
    listener: socket.socket,
    tally: Tally,
    make_command: MakeCommand,
    reload: Callable[[], Config],
) -> None:
    """Serve the admin listener until SIGTERM or SIGINT, in a process of its own. On SIGHUP `reload`
    reads the configuration again."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    async def replace() -> None:
        fresh = await loop.run_in_executor(None, reload)
        server.use(fresh, await loop.run_in_executor(None, admin_auth, fresh))

    reloads = Reloads(replace)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloads.request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    auth = await loop.run_in_executor(None, admin_auth, config)
    server = AdminServer(listener, config, store, tally, make_command, auth)
    server.open()
    reloading = asyncio.create_task(reloads.run())
    await stopping.wait()
    end_within(MARGIN)
    reloading.cancel()
    await asyncio.gather(reloading, server.close(), return_exceptions=True)
