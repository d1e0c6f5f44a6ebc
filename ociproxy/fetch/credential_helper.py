"""Credential helpers: running `docker-credential-NAME`, and how long its answer is used.

A helper is a program that mostly asks a cloud. Its answer is used for the configured lifetime, and
renewed shortly before the end of it, while the old answer still serves. An answer that the upstream
refuses is replaced at once. All other sources of credentials are read anew each time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.clock import SystemClock, time_left
from ociproxy.config.settings import Secret
from ociproxy.errors import UpstreamDenied
from ociproxy.fetch.credentials import Credentials, credentials_for, no_credentials
from ociproxy.oci.reference import DOCKER_HUB

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Auth

_RUN_LIMIT: Final = 10.0
"""Seconds that a helper may run: a client waits at most 20 s for headers, all told."""
_END_LIMIT: Final = 1.0
"""Seconds that a killed helper has to end."""
_RENEW_AT: Final = 0.8
"""Part of the lifetime after which the next answer is fetched."""
_AGAIN_AFTER: Final = 10.0
"""Seconds between two runs of a helper whose answers are refused, or that fails to renew one."""

_DOCKER_HUB_SERVER: Final = "https://index.docker.io/v1/"
"""Docker Hub's name for Docker and its helpers."""
_NOT_FOUND: Final = b"credentials not found in native keychain"
"""What helpers made with Docker's library print before they exit with 1."""
_TOKEN_USER: Final = "<token>"  # noqa: S105 - a marker
"""As a user name: the secret is an OAuth2 refresh token."""


def run_helper(name: str, registry: str) -> Credentials | None:
    """The answer of one run; None if the helper has no credentials. Raises UpstreamDenied. The
    server's name goes in by stdin, never as an argument."""
    program = f"docker-credential-{name}"
    server = _DOCKER_HUB_SERVER if registry == DOCKER_HUB else registry
    try:
        process = subprocess.Popen(  # noqa: S603 - the operator's program, its name is checked
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # In a group of its own, a child of the helper is killed with it and closes the pipe.
            start_new_session=True,
        )
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise no_credentials(registry, f"{program} cannot be run: {reason}") from error
    limit = time_left(_RUN_LIMIT)
    try:
        output, _ = process.communicate(server.encode(), timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        raise no_credentials(registry, f"{program} took longer than {limit:g} s") from None
    except BaseException:
        _end(process)
        raise
    if process.returncode != 0:
        if _NOT_FOUND in output:
            return None
        raise no_credentials(registry, f"{program} failed with exit status {process.returncode}")
    return _parse_answer(output, program, registry)


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for as long as that takes
        process.wait(_END_LIMIT)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _parse_answer(output: bytes, program: str, registry: str) -> Credentials | None:
    try:
        answer = json.loads(output)
        user, password = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        # The cause would show the output, which holds the secret.
        raise no_credentials(registry, f"{program} gave no Username and Secret") from None
    if user == _TOKEN_USER:
        raise no_credentials(registry, f"{program} gave an identity token, which is not supported")
    if not isinstance(user, str) or not isinstance(password, str) or not user or not password:
        return None
    return Credentials(user, Secret(password))


@dataclass(slots=True)
class _Answer:
    """A helper's answer: when it came, and when it was last to be renewed (monotonic seconds)."""

    credentials: Credentials | None
    since: float
    tried: float


class CredentialSource:
    """The credentials of one upstream, whatever its `auth` section names. Thread-safe."""

    def __init__(self, auth: Auth, registry: str, *, clock: Clock | None = None) -> None:
        """`registry` is the name that a helper or Docker's file is asked for."""
        self._auth = auth
        self._registry = registry
        self._clock = clock or SystemClock()
        self._answers: dict[str, _Answer] = {}
        self._running = Lock()
        self._replaced = float("-inf")

    def get(self, repository: str = "") -> Credentials | None:
        """None where Docker's file has none. Raises UpstreamDenied."""
        return credentials_for(self._auth, self._registry, self._call_helper, repository)

    def replace(self, refused: Credentials | None, repository: str = "") -> Credentials | None:
        """Other credentials than the upstream has refused, or None. Raises UpstreamDenied."""
        now = self._clock.monotonic()
        with self._running:
            old = [name for name, each in self._answers.items() if each.credentials == refused]
            if old and now - self._replaced < _AGAIN_AFTER:
                return None
            for name in old:
                self._replaced = now
                del self._answers[name]
        # Another thread may have replaced the refused ones already: then that answer is used.
        found = self.get(repository) if self._answers or old else None
        return None if found == refused else found

    def _call_helper(self, name: str, registry: str) -> Credentials | None:
        """The helper's last answer, or a new one when that is due."""
        answer = self._answers.get(name)
        if answer is not None and not self._is_due(answer):
            return answer.credentials
        good = answer is not None and self._is_good(answer)
        # While the old answer is good, only the thread that renews it waits for the helper.
        if not self._running.acquire(timeout=0 if good else _RUN_LIMIT + 1):
            if answer is not None and good:
                return answer.credentials
            raise no_credentials(registry, f"timed out waiting for docker-credential-{name}")
        try:
            return self._renew(name, registry)
        finally:
            self._running.release()

    def _renew(self, name: str, registry: str) -> Credentials | None:
        answer = self._answers.get(name)
        if answer is not None and not self._is_due(answer):
            return answer.credentials  # another thread has just renewed it
        now = self._clock.monotonic()
        try:
            found = run_helper(name, registry)
        except UpstreamDenied as exc:
            if answer is None or not self._is_good(answer):
                raise
            answer.tried = now
            log.event(logging.WARNING, "credentials not renewed", upstream=registry, reason=exc)
            return answer.credentials
        self._answers[name] = _Answer(found, now, now)
        return found

    def _is_good(self, answer: _Answer) -> bool:
        return self._clock.monotonic() - answer.since < self._auth.lifetime

    def _is_due(self, answer: _Answer) -> bool:
        now = self._clock.monotonic()
        if not self._is_good(answer):
            return True
        return now - answer.since >= self._auth.lifetime * _RENEW_AT and (
            answer.tried == answer.since or now - answer.tried >= _AGAIN_AFTER
        )
