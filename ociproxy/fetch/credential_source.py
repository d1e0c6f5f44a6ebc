"""The credentials of one upstream, with a helper's answers kept for a while.

A helper is a program to start, and mostly asks a cloud. What it answered is used for the configured
lifetime and renewed before that is over, while the old answer is still good; one that the upstream
refuses is replaced at once. All other sources are read anew each time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.clock import SystemClock
from ociproxy.errors import UpstreamDenied
from ociproxy.fetch.credentials import HELPER_TIMEOUT, ask_helper, credentials_for

if TYPE_CHECKING:
    from ociproxy.clock import Clock
    from ociproxy.config.settings import Auth
    from ociproxy.fetch.credentials import Credentials

_RENEW_AT: Final = 0.8
"""Of the lifetime, after which a new answer is asked for."""
_AGAIN_AFTER: Final = 10.0
"""Seconds between two runs of a helper whose answer is refused, or that fails to renew one."""


@dataclass(slots=True)
class _Kept:
    """A helper's answer; `since` and `tried` are when it came, and when it was last renewed."""

    credentials: Credentials | None
    since: float
    tried: float


class CredentialSource:
    """Thread-safe."""

    def __init__(self, auth: Auth, registry: str, *, clock: Clock | None = None) -> None:
        """`registry` is whom a helper or Docker's file is asked about."""
        self._auth = auth
        self._registry = registry
        self._clock = clock or SystemClock()
        self._kept: dict[str, _Kept] = {}
        self._running = Lock()
        self._replaced = float("-inf")

    def get(self) -> Credentials | None:
        """None where Docker's file has none. Raises UpstreamDenied."""
        return credentials_for(self._auth, self._registry, ask=self._ask)

    def replace(self, refused: Credentials | None) -> Credentials | None:
        """What a helper says now that the upstream has refused its earlier answer; None where
        there is nothing else to say. Raises UpstreamDenied."""
        now = self._clock.monotonic()
        with self._running:
            old = [name for name, kept in self._kept.items() if kept.credentials == refused]
            if old and now - self._replaced < _AGAIN_AFTER:
                return None
            for name in old:
                self._replaced = now
                del self._kept[name]
        # Others may have come since these were sent.
        found = self.get() if self._kept or old else None
        return None if found == refused else found

    def _ask(self, name: str, registry: str) -> Credentials | None:
        kept = self._kept.get(name)
        if kept is not None and not self._is_due(kept):
            return kept.credentials
        good = kept is not None and self._age(kept) < self._auth.lifetime
        # Whoever has an answer that is still good does not wait for the next one.
        if not self._running.acquire(timeout=0 if good else HELPER_TIMEOUT + 1):
            if kept is not None and good:
                return kept.credentials
            reason = f"no credentials: timed out waiting for docker-credential-{name}"
            raise UpstreamDenied(registry, reason, status=401)
        try:
            return self._run(name, registry)
        finally:
            self._running.release()

    def _run(self, name: str, registry: str) -> Credentials | None:
        kept = self._kept.get(name)
        if kept is not None and not self._is_due(kept):
            return kept.credentials  # somebody else has just been here
        now = self._clock.monotonic()
        try:
            found = ask_helper(name, registry)
        except UpstreamDenied as exc:
            if kept is None or self._age(kept) >= self._auth.lifetime:
                raise
            kept.tried = now
            log.event(logging.WARNING, "credentials not renewed", upstream=registry, reason=exc)
            return kept.credentials
        self._kept[name] = _Kept(found, now, now)
        return found

    def _is_due(self, kept: _Kept) -> bool:
        age, lifetime = self._age(kept), self._auth.lifetime
        if age >= lifetime:
            return True
        return age >= lifetime * _RENEW_AT and (
            kept.tried == kept.since or self._clock.monotonic() - kept.tried >= _AGAIN_AFTER
        )

    def _age(self, kept: _Kept) -> float:
        return self._clock.monotonic() - kept.since
