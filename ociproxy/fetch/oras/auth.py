"""Authentication with one repository of one upstream: its challenge and its token.

Each repository has a token of its own: oras' own token backend answers a second repository's 401
with the first one's token. The password goes to the upstream, or to the realm that the upstream
names. It goes over plain HTTP only if the upstream is configured as plain HTTP.

Tests: tests/fetch/oras/test_auth.py, tests/fetch/oras/test_challenges.py.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import requests
from oras.auth.base import AuthBackend
from requests.utils import unquote_header_value

from ociproxy.bounded import BoundedCache
from ociproxy.clock import time_left
from ociproxy.errors import UpstreamDenied, UpstreamForbidden, UpstreamUnavailable
from ociproxy.fetch.oras.errors import refuse, translated
from ociproxy.fetch.oras.session import Session, discard, origin, read_bounded, upstream_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Timeouts
    from ociproxy.fetch.credential_helper import CredentialSource
    from ociproxy.fetch.credentials import Credentials
    from ociproxy.oci.reference import Repository

_TOKEN_LIFE: Final = 60.0
"""Seconds that a token lives if the realm does not say (Docker's token specification)."""
_ORIGINS: Final = 16
"""Other registries, behind redirects of one repository, whose tokens are kept."""
_TOKEN_LIMIT: Final = 1024 * 1024
"""Bytes of a realm's answer: many times a real token."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a Www-Authenticate header; scheme and parameter names in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """RFC 9110, 11.6.1: commas separate challenges as well as their parameters. A part that has a
    word and a space before its first `=` begins a challenge."""
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
    """The first bearer challenge, else the first basic one: a token saves sending the password."""
    known = {challenge.scheme: challenge for challenge in reversed(parse_challenges(header))}
    return known.get("bearer") or known.get("basic")


class RepositoryAuth(AuthBackend):  # type: ignore[misc] # oras ships no types
    """The part that oras calls when an upstream answers 401 or 403. Thread-safe. `credentials` is
    None for an anonymous upstream. It is read for each token, so that a rotated password is used.
    `secure` says that the upstream itself is asked over HTTPS."""

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
        """Headers for the next request: a known token saves a 401. Raises UpstreamError kinds."""
        if self._authorization is not None and time.monotonic() >= self._renew_at:
            with self._locked():
                if self._challenge is not None and time.monotonic() >= self._renew_at:
                    self._obtain(self._challenge)
        authorization = self._authorization
        return {} if authorization is None else {"Authorization": authorization}

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str] | None, refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        """The headers with other credentials, and True; oras then sends the request once more.
        `refresh` says that it is the second time. Raises UpstreamDenied where another try cannot
        help, since oras does not always look at the second value."""
        if _is_elsewhere(original):
            # Another host, which a redirect led to, must not ask for the upstream's credentials.
            raise refuse(original, self._upstream)
        return self.renew(original, headers, refresh=refresh), True

    def renew(
        self, original: requests.Response, headers: dict[str, str] | None, *, refresh: bool = False
    ) -> dict[str, str]:
        """The headers with other credentials. Raises UpstreamDenied where there are none."""
        denied = refuse(original, self._upstream)
        sent = (headers or {}).get("Authorization")
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
            # Else another thread has renewed it since this request was sent.
            authorization = self._authorization
        if authorization is None or authorization == sent:
            raise denied
        return {**(headers or {}), "Authorization": authorization}

    def _obtain(self, challenge: Challenge, *, refused: str | None = None) -> None:
        """Set `_authorization` for this challenge. `refused` is the header that was not accepted. A
        helper whose answer was refused is run once more."""
        self._challenge = challenge
        source = self._credentials
        credentials = None if source is None else source.get(self._repository.name)
        if challenge.scheme == "basic":
            if source is not None and credentials is not None and _basic(credentials) == refused:
                fresh = source.replace(credentials, self._repository.name)
                credentials = fresh or credentials
            self._authorization = None if credentials is None else _basic(credentials)
            self._renew_at = float("inf")
            return
        try:
            self._fetch_token(challenge, credentials)
        except UpstreamDenied:
            fresh = None if source is None else source.replace(credentials, self._repository.name)
            if fresh is None:
                raise
            self._fetch_token(challenge, fresh)

    def _fetch_token(self, challenge: Challenge, credentials: Credentials | None) -> None:
        started = time.monotonic()
        answer = self._request_token(challenge, credentials)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str):
            raise UpstreamUnavailable(self._upstream, "its token realm answers without a token")
        life = answer.get("expires_in")
        if isinstance(life, bool) or not isinstance(life, (int, float)) or life <= 0:
            life = _TOKEN_LIFE
        self._authorization = f"Bearer {token}"
        # Early enough for requests on their way, and not all the time if the life is short.
        self._renew_at = started + life - min(10.0, life / 5)

    def _request_token(
        self, challenge: Challenge, credentials: Credentials | None
    ) -> dict[str, object]:
        realm = challenge.parameters.get("realm", "")
        scheme = upstream_url(realm, self._upstream, what="token realm").scheme
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
        """Held while a token is fetched: other threads wait and use the same one."""
        if not self._lock.acquire(
            timeout=time_left(self._timeouts.connect + self._timeouts.headers)
        ):
            reason = "timed out waiting for another request's token"
            raise UpstreamUnavailable(self._upstream, reason, timed_out=True)
        try:
            yield
        finally:
            self._lock.release()


class RepositorySession:
    """The session by which oras sends the requests of one repository. Thread-safe.

    A redirect may lead to another registry, which wants a token of its own. It gets an anonymous
    one, for its origin only, and nothing that the upstream itself is sent.
    """

    def __init__(self, repository: Repository, *, session: Session, timeouts: Timeouts) -> None:
        self._repository = repository
        self._session = session
        self._timeouts = timeouts
        self._auths: BoundedCache[object, RepositoryAuth] = BoundedCache(_ORIGINS)

    def request(
        self, method: str, url: str, *, headers: dict[str, str], **options: Any
    ) -> requests.Response:
        """Called by oras. Raises UpstreamDenied where no anonymous token is to be had."""
        response = self._session.request(method, url, headers=headers, **options)
        if response.status_code != 401 or not _is_elsewhere(response):
            return response
        auth, url = self._auth(response.url), response.url
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
        known = {**headers, **auth.get_auth_header()}
        if known != headers:
            discard(response)
            response = self._session.request(method, url, headers=known, **options)
            if response.status_code != 401 or _is_elsewhere(response):
                return response
        headers = auth.renew(response, known)
        return self._session.request(method, url, headers=headers, **options)

    def _auth(self, url: str) -> RepositoryAuth:
        place = origin(url)
        auth = self._auths.get(place)
        if auth is None:
            auth = RepositoryAuth(
                self._repository,
                session=self._session,
                timeouts=self._timeouts,
                credentials=None,
                secure=place[0] == "https",
            )
            self._auths.put(place, auth)
        return auth


def _is_elsewhere(response: requests.Response) -> bool:
    """Whether redirects led to another origin than was asked."""
    asked = response.history[0].url if response.history else response.url
    return origin(asked) != origin(response.url)


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password.reveal()}"
    return "Basic " + b64encode(pair.encode()).decode("ascii")
