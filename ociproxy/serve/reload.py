"""SIGHUP: a new configuration takes over, and what was begun before is finished.

Reloads run one after the other, and each reads the files that are there when it begins: the last
signal decides.
"""

from __future__ import annotations

import asyncio
import logging
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import OciProxyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ociproxy.config.settings import Config
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.auth import BasicAuth
    from ociproxy.serve.supervisor import Supervisor

READ_AT_START: Final = (
    "store.path",
    "store.hot_manifests",
    "log",
    "serve.host",
    "serve.port",
    "serve.workers",
    "serve.preload_images",
    "serve.bundles",
    "serve.client_stall",
    "serve.shutdown_grace",
    "serve.admin.host",
    "serve.admin.port",
)
"""Keys of the configuration that a reload does not change."""


def warn_of_restart(began: Config, fresh: Config) -> None:
    """Name the keys that `fresh` has otherwise than the configuration of the start."""
    keys = [key for key in READ_AT_START if attrgetter(key)(began) != attrgetter(key)(fresh)]
    if keys:
        log.event(logging.WARNING, "restart needed", keys=", ".join(keys))


class Generation:
    """What requests are answered with between two reloads. Belongs to one event loop.

    With `auth` None every client may pull. The server counts in `running` the requests that are
    being answered, and sets `idle` when the last one has ended.
    """

    def __init__(self, engine: Engine, config: Config, auth: BasicAuth | None) -> None:
        self.engine = engine
        self.auth = auth
        self.default_upstream = config.serve.default_upstream
        self.offline = config.serve.offline
        self.answer_limit = config.fetch.timeouts.answer
        self._grace = config.serve.reload_grace
        self.running = 0
        self.idle = asyncio.Event()

    async def retire(self, successor: Generation) -> None:
        """Let `successor` do what has not begun. Finish what has, within its `reload_grace`, then
        close."""
        grace = successor._grace
        self.engine.hand_over(successor.engine)
        try:
            async with asyncio.timeout(grace):
                while self.running:
                    self.idle.clear()
                    await self.idle.wait()
                await self.engine.drain()
        except TimeoutError:
            log.event(logging.WARNING, "reload grace is over", grace=grace, requests=self.running)
        finally:
            await self.close()

    async def close(self) -> None:
        if self.auth is not None:
            self.auth.close()
        await self.engine.close()


class Reloads:
    """`run` is a task of the server, which cancels it."""

    def __init__(
        self, reload: Callable[[], Awaitable[None]], supervisor: Supervisor | None = None
    ) -> None:
        """`reload` raises OciProxyError where the running configuration stays. With `supervisor`
        None another process tells of the reload."""
        self._reload = reload
        self._supervisor = supervisor
        self._wanted = asyncio.Event()

    def request(self) -> None:
        """Signals that come while a reload runs make one more, after it."""
        self._wanted.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if self._supervisor is not None:
                await loop.run_in_executor(None, self._supervisor.reloading)
            try:
                await self._reload()
            except OciProxyError as exc:
                log.event(logging.ERROR, "configuration not reloaded", reason=exc)
            except Exception as exc:  # noqa: BLE001 a bug leaves the server as it is
                log.failure("configuration not reloaded", exc)
            else:
                log.event(logging.INFO, "configuration reloaded")
            if self._supervisor is not None:
                await loop.run_in_executor(None, self._supervisor.ready)
