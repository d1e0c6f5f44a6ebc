"""Authentication with one repository of one upstream: its challenge, its token, nobody else's.

A token is never shared between repositories: oras' own token backend answers a second repository's
401 with the first one's token. The password goes to the upstream itself or to the realm it names,
and to neither over plain HTTP unless the upstream is configured as plain HTTP.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import requests
from oras.auth.base import AuthBackend
from requests.utils import unquote_header_value

from ociproxy.errors import UpstreamDenied, UpstreamForbidden, UpstreamUnavailable
from ociproxy.fetch.oras.errors import refuse, translated
from ociproxy.fetch.oras.session import Session, origin, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Timeouts
    from ociproxy.fetch.credential_helper import CredentialSource
    from ociproxy.fetch.credentials import Credentials
    from ociproxy.oci.reference import Repository

_TOKEN_LIFE: Final = 60.0
"""Seconds, where the realm does not say (Docker's token authentication specification)."""

_TOKEN_LIMIT: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One of a Www-Authenticate header: its scheme in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """RFC 9110, 11.6.1: challenges and their parameters are separated by the same commas.

    A part that starts with a word and a space before any `=` begins a challenge.
    """
    challenges: list[Challenge] = []
    for part in filter(str.strip, urllib.request.parse_http_list(header)):
        name, equals, value = part.partition("=")
        scheme, space, name = name.strip().rpartition(" ")
        if space or not equals:
            challenges.append(Challenge((scheme or name).strip().lower(), {}))
        if equals and challenges:
            parameter = unquote_header_value(value.strip())
            challenges[-1].parameters.setdefault(name.strip().lower(), parameter)
    return challenges


def find_challenge(header: str) -> Challenge | None:
    """The one we can meet: a token rather than the password in every request."""
    known = {challenge.scheme: challenge for challenge in reversed(parse_challenges(header))}
    return known.get("bearer") or known.get("basic")


class RepositoryAuth(AuthBackend):  # type: ignore[misc] # oras ships no types
    """What oras asks when an upstream answers 401 or 403; safe to use from many threads at once.

    `credentials` gives None for an anonymous upstream; the source is asked anew each time some are
    needed, so that a rotated password is found. `secure` is whether the upstream itself is HTTPS.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        session: Session,
        timeouts: Timeouts,
        credentials: CredentialSource | None,
        secure: bool,
    ) -> None:
        super().__init__()
        self.session = session
        self._repository = repository
        self._upstream = session.upstream
        self._timeouts = timeouts
        self._credentials = credentials
        self._secure = secure
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._authorization: str | None = None
        self._renew_at = 0.0

    def get_auth_header(self) -> dict[str, str]:
        """For the next request, so that a token is used again without a 401 before each request."""
        if self._authorization is not None and time.monotonic() >= self._renew_at:
            with self._locked():
                if self._challenge is not None and time.monotonic() >= self._renew_at:
                    self._obtain(self._challenge)
        authorization = self._authorization
        return {} if authorization is None else {"Authorization": authorization}

    def authenticate_request(
        self,
        original: requests.Response,
        headers: dict[str, str] | None,
        refresh: bool = False,
    ) -> tuple[dict[str, str], bool]:
        """Headers for one more try. Raises UpstreamDenied where another try cannot help: oras makes
        it without looking at the second value."""
        denied = refuse(original, self._upstream)
        sent = (headers or {}).get("Authorization")
        asked = original.history[0].url if original.history else original.url
        if origin(asked) != origin(original.url):
            # A redirect's target has no say over the upstream's credentials.
            raise denied
        given = find_challenge(original.headers.get("Www-Authenticate", ""))
        if refresh or (original.status_code == 403 and sent is None and given is None):
            raise denied
        with self._locked():
            challenge = given or self._challenge
            if challenge is None:
                raise denied
            if self._authorization in (None, sent):
                self._authorization = None
                self._obtain(challenge, refused=sent)
            # Otherwise another thread has been here since our request was sent.
            authorization = self._authorization
        if authorization is None or authorization == sent:
            raise denied
        return {**(headers or {}), "Authorization": authorization}, True

    def _obtain(self, challenge: Challenge, *, refused: str | None = None) -> None:
        """Another try with what a helper says now, where its earlier answer is not accepted."""
        self._challenge = challenge
        source = self._credentials
        credentials = None if source is None else source.get()
        if challenge.scheme == "basic":
            if source is not None and credentials is not None and _basic(credentials) == refused:
                credentials = source.replace(credentials) or credentials
            self._authorization = None if credentials is None else _basic(credentials)
            self._renew_at = float("inf")
            return
        try:
            self._take_token(challenge, credentials)
        except UpstreamDenied:
            fresh = None if source is None else source.replace(credentials)
            if fresh is None:
                raise
            self._take_token(challenge, fresh)

    def _take_token(self, challenge: Challenge, credentials: Credentials | None) -> None:
        started = time.monotonic()
        answer = self._ask_realm(challenge, credentials)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str):
            raise UpstreamUnavailable(self._upstream, "its token realm answers without a token")
        life = answer.get("expires_in")
        if isinstance(life, bool) or not isinstance(life, (int, float)) or life <= 0:
            life = _TOKEN_LIFE
        self._authorization = f"Bearer {token}"
        # Before it expires under a request on its way, without asking all the time for a short one.
        self._renew_at = started + life - min(10.0, life / 5)

    def _ask_realm(
        self, challenge: Challenge, credentials: Credentials | None
    ) -> dict[str, object]:
        realm = challenge.parameters.get("realm", "")
        scheme = urlsplit(realm).scheme
        if scheme not in ("http", "https"):
            raise UpstreamDenied(self._upstream, "its challenge names no token realm", status=401)
        if credentials is not None and scheme == "http" and self._secure:
            reason = "its token realm asks for the password over plain HTTP"
            raise UpstreamForbidden(self._upstream, reason)
        scope = challenge.parameters.get("scope") or f"repository:{self._repository.name}:pull"
        parameters = [("scope", each) for each in scope.split()]
        if service := challenge.parameters.get("service"):
            parameters.insert(0, ("service", service))
        headers = {} if credentials is None else {"Authorization": _basic(credentials)}
        with translated(self._upstream, self._timeouts):
            response = self.session.get(realm, params=parameters, headers=headers, stream=True)
            if response.status_code != 200:
                raise refuse(response, self._upstream)
            raw = read_bounded(response, _TOKEN_LIMIT)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            reason = "its token realm does not answer with JSON"
            raise UpstreamUnavailable(self._upstream, reason) from exc
        return answer if isinstance(answer, dict) else {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held while a token is fetched: the others want the same one."""
        if not self._lock.acquire(timeout=self._timeouts.connect + self._timeouts.headers):
            reason = "timed out waiting for another request's token"
            raise UpstreamUnavailable(self._upstream, reason, timed_out=True)
        try:
            yield
        finally:
            self._lock.release()


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password.reveal()}"
    return "Basic " + b64encode(pair.encode()).decode("ascii")
