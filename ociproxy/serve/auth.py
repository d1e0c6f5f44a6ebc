"""Basic authentication of clients against an htpasswd file.

bcrypt is slow on purpose. A password is checked once for all requests that carry it, in a small
pool of threads; the result is kept under a keyed hash until the file changes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

import bcrypt

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import time_left
from ociproxy.config.htpasswd import read_htpasswd
from ociproxy.errors import Busy, ConfigError
from ociproxy.serve.errors import Unauthorized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

    from ociproxy.config.local_settings import ServerAuth

_THREADS: Final = 2
"""Passwords checked at once: a flood of wrong ones must leave processors for other clients."""
_WAITING: Final = 64
"""Different passwords that may run and wait; further ones are answered Busy."""
_WAITING_EACH: Final = 8
"""Of these for one client: one that guesses must leave places for those that log in."""
_WAIT_LIMIT: Final = 10.0
"""Seconds that a request waits for its password to be checked."""
_LOOK_LIMIT: Final = 2.0
"""Seconds that a request waits for a look at the file; the old users hold where it takes longer."""
_REMEMBERED: Final = 4096
"""Right passwords, and as many wrong ones, whose result is kept."""
_LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at the file's stat."""
_BCRYPT_LIMIT: Final = 72
"""Bytes of a password that bcrypt uses; htpasswd ignores the rest as well."""


class BasicAuth:
    """Belongs to one event loop; `close` when that ends. One that a reload replaces is not closed:
    requests may still wait for its threads, which end with it.

    The constructor blocks: it reads the file. Raises ConfigError.
    """

    def __init__(self, auth: ServerAuth) -> None:
        self._path = auth.htpasswd
        self._secret = secrets.token_bytes(32)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="password")
        self._of_client: Counter[str | None] = Counter()
        self._looked = time.monotonic()
        self._stamp = self._file_stamp()
        self._use(read_htpasswd(self._path))

    def _use(self, users: Mapping[bytes, bytes]) -> None:
        # Results for the old file do not hold for the new one.
        self._users = users
        self._right: BoundedCache[bytes, bool] = BoundedCache(_REMEMBERED)
        self._wrong: BoundedCache[bytes, bool] = BoundedCache(_REMEMBERED)
        self._checking: dict[bytes, asyncio.Future[bool]] = {}

    async def check(self, request: web.BaseRequest) -> None:
        """Check the Authorization header. Raises Unauthorized, or Busy where too many wait."""
        authorization = request.headers.get("Authorization")
        if time.monotonic() - self._looked >= _LOOK_INTERVAL:
            self._looked = time.monotonic()
            # Shielded: a client that leaves meanwhile must not take the new users along.
            looking = asyncio.shield(asyncio.ensure_future(self._look()))
            try:
                await asyncio.wait_for(looking, time_left(_LOOK_LIMIT))
            except TimeoutError:
                log.event(logging.ERROR, "users not reloaded", reason="the disk does not answer")
        if authorization is None:
            raise Unauthorized("credentials are required")
        user, password = _parse(authorization)
        key = self._key(user, password)
        if self._right.get(key):
            return
        if self._wrong.get(key) or not await self._verify(key, user, password, request.remote):
            raise Unauthorized("wrong user name or password")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _key(self, user: bytes, password: bytes) -> bytes:
        # A name has no colon, so the text names one pair. The password itself is not kept.
        return hashlib.blake2b(user + b":" + password, key=self._secret).digest()

    async def _verify(self, key: bytes, user: bytes, password: bytes, client: str | None) -> bool:
        checking = self._checking.get(key)
        if checking is None:
            if len(self._checking) >= _WAITING or self._of_client[client] >= _WAITING_EACH:
                raise Busy("too many passwords to check")
            # An unknown user takes as long as a known one: the time must not tell which exist.
            hashed = self._users.get(user) or next(iter(self._users.values()))
            work = partial(_matches, password, hashed, known=user in self._users)
            checking = asyncio.get_running_loop().run_in_executor(self._threads, work)
            self._checking[key] = checking
            self._of_client[client] += 1
            checking.add_done_callback(partial(self._learn, key, self._checking, client))
        try:
            async with asyncio.timeout(time_left(_WAIT_LIMIT)):
                # Shielded: other requests wait for the same result.
                return await asyncio.shield(checking)
        except TimeoutError as exc:
            raise Busy("too many passwords to check") from exc

    def _learn(
        self,
        key: bytes,
        checking: dict[bytes, asyncio.Future[bool]],
        client: str | None,
        answer: asyncio.Future[bool],
    ) -> None:
        del checking[key]
        self._of_client[client] -= 1
        if not self._of_client[client]:
            del self._of_client[client]
        if answer.cancelled() or answer.exception() is not None:
            return
        if checking is self._checking:
            (self._right if answer.result() else self._wrong).put(key, True)

    async def _look(self) -> None:
        """Read the file again if it has changed; a bad file leaves the users as they are."""
        try:
            users = await asyncio.get_running_loop().run_in_executor(None, self._changed)
        except ConfigError as exc:
            log.event(logging.ERROR, "users not reloaded", reason=exc)
            return
        if users is not None:
            self._use(users)
            log.event(logging.INFO, "users reloaded", users=len(users))

    def _changed(self) -> Mapping[bytes, bytes] | None:
        """The users of a changed file, else None. Blocks. Raises ConfigError."""
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        return read_htpasswd(self._path)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def _parse(authorization: str) -> tuple[bytes, bytes]:
    """User name and password as bytes: the challenge asks for UTF-8, and htpasswd has bytes."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        raise Unauthorized("only basic authentication is accepted")
    try:
        text = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Unauthorized("not the credentials of basic authentication") from exc
    user, colon, password = text.partition(b":")
    if not colon:
        raise Unauthorized("not the credentials of basic authentication")
    return user, password


def _matches(password: bytes, hashed: bytes, *, known: bool) -> bool:
    if b"\0" in password:
        return False
    return bcrypt.checkpw(password[:_BCRYPT_LIMIT], hashed) and known
