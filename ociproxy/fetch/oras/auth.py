"""Authentication with one repository of one upstream: its challenges and its tokens.

Each repository has tokens of its own: oras' own token backend answers a second repository's 401
with the first one's token. A token is for what its challenge asked for: an upstream may ask another
scope for its lists than for its manifests. The password goes to the upstream, or to the realm that
the upstream names. It goes over plain HTTP only if the upstream is configured as plain HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import requests
from oras.auth.base import AuthBackend

from ociproxy.bounded import BoundedCache
from ociproxy.clock import time_left
from ociproxy.errors import UpstreamDenied, UpstreamForbidden, UpstreamUnavailable
from ociproxy.fetch.oras.challenges import Demand, find_challenge
from ociproxy.fetch.oras.errors import FOREIGN, refuse, translate
from ociproxy.fetch.oras.session import Session, discard, origin, read_bounded, upstream_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Timeouts
    from ociproxy.fetch.credential_helper import CredentialSource
    from ociproxy.fetch.credentials import Credentials
    from ociproxy.fetch.oras.challenges import Challenge
    from ociproxy.oci.reference import Repository

_TOKEN_LIFE: Final = 60.0
"""Seconds that a token lives if the realm does not say (Docker's token specification)."""
_TOKEN_LIFE_MAX: Final = 86400.0
"""Seconds after which a token is asked for anew, whatever the realm says."""
_ORIGINS: Final = 16
"""Other registries, behind redirects of one repository, whose tokens are kept."""
_TOKEN_LIMIT: Final = 1024 * 1024
"""Bytes of a realm's answer: many times a real token."""
_TOKENS: Final = 8
"""Tokens kept of one repository: one for each scope that its upstream asks for."""
_PULL: Final = ("manifests", "blobs")
"""Kinds of requests that try each other's token: hardly an upstream asks two scopes for a pull."""


@dataclass(slots=True)
class _Token:
    """The Authorization header for one demand. The lock is held while it is obtained."""

    authorization: str | None = None
    renew_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class RepositoryAuth(AuthBackend):  # type: ignore[misc] # oras ships no types
    """The part that oras calls when an upstream answers 401 or 403. Thread-safe. `credentials` is
    None for an anonymous upstream. It is read for each token, so that a rotated password is used.
    `secure` says that the upstream itself is asked over HTTPS, `elsewhere` that it is another
    registry, which a redirect led to: its token realm is not offered the client certificate."""

    def __init__(
        self,
        repository: Repository,
        *,
        session: Session,
        timeouts: Timeouts,
        credentials: CredentialSource | None,
        secure: bool,
        elsewhere: bool = False,
    ) -> None:
        super().__init__()
        self.session = session
        self._repository = repository
        self._upstream = session.upstream
        self._timeouts = timeouts
        self._credentials = credentials
        self._secure = secure
        self._elsewhere = elsewhere
        self._lock = threading.Lock()
        """Guards the tokens and the demands; held across nothing."""
        self._tokens: BoundedCache[Demand, _Token] = BoundedCache(_TOKENS)
        self._demands: dict[str, Demand] = {}
        """What each kind of request was last challenged for."""

    def get_auth_header(self, url: str) -> dict[str, str]:
        """Headers for a request: a known token saves a 401. Raises UpstreamError kinds."""
        demand = self._demand_for(url)
        if demand is None:
            return {}
        token = self._token(demand)
        if token.authorization is not None and time.monotonic() >= token.renew_at:
            with self._locked(token):
                if time.monotonic() >= token.renew_at:
                    self._obtain(token, demand)
        authorization = token.authorization
        return {} if authorization is None else {"Authorization": authorization}

    def is_unchallenged(self, url: str) -> bool:
        """Whether there are credentials which no answer to such a request has asked for."""
        return self._credentials is not None and self._demand_for(url) is None

    def meet(self, challenge: Challenge, url: str) -> None:
        """Be ready for such a request to be challenged so. Raises UpstreamError kinds."""
        self._meet(Demand.of(challenge), url, None)

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str] | None, refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        """The headers with other credentials, and True; oras then sends the request once more.
        `refresh` says that it is the second time. Raises UpstreamDenied where another try cannot
        help, since oras does not always look at the second value."""
        if _is_elsewhere(original):
            # Another host, which a redirect led to, must not ask for the upstream's credentials.
            raise refuse(original, self._upstream)
        requested = original.history[0].url if original.history else original.url
        return self.renew(original, headers, requested, refresh=refresh), True

    def renew(
        self,
        original: requests.Response,
        headers: dict[str, str] | None,
        requested: str,
        *,
        refresh: bool = False,
    ) -> dict[str, str]:
        """The headers with other credentials. Raises UpstreamDenied where there are none."""
        denied = refuse(original, self._upstream)
        sent = (headers or {}).get("Authorization")
        given = find_challenge(original.headers.get("Www-Authenticate", ""))
        if refresh or (original.status_code == 403 and sent is None and given is None):
            raise denied
        demand = self._demand_for(requested) if given is None else Demand.of(given)
        if demand is None:
            raise denied
        authorization = self._meet(demand, requested, sent)
        if authorization is None or authorization == sent:
            raise denied
        return {**(headers or {}), "Authorization": authorization}

    def _meet(self, demand: Demand, url: str, sent: str | None) -> str | None:
        """The header for this demand, other than the one that was sent, if there is one."""
        token = self._token(demand)
        with self._lock:
            self._demands[_kind(url)] = demand
        with self._locked(token):
            if token.authorization in (None, sent):
                token.authorization = None
                self._obtain(token, demand, refused=sent)
            # Else another thread has renewed it since this request was sent.
            return token.authorization

    def _demand_for(self, url: str) -> Demand | None:
        """What such a request will probably be asked for."""
        if not self._demands:
            return None
        kind = _kind(url)
        with self._lock:
            demand = self._demands.get(kind)
            for other, known in self._demands.items():
                if demand is None and (known.scheme == "basic" or {kind, other} == set(_PULL)):
                    demand = known
            return demand

    def _token(self, demand: Demand) -> _Token:
        with self._lock:
            token = self._tokens.get(demand)
            if token is None:
                token = _Token()
                self._tokens.put(demand, token)
            return token

    def _obtain(self, token: _Token, demand: Demand, *, refused: str | None = None) -> None:
        """Set the authorization for this demand. `refused` is the header that was not accepted. A
        helper whose answer was refused is run once more."""
        source = self._credentials
        credentials = None if source is None else source.get(self._repository.name)
        if demand.scheme == "basic":
            if source is not None and credentials is not None and _basic(credentials) == refused:
                fresh = source.replace(credentials, self._repository.name)
                credentials = fresh or credentials
            token.authorization = None if credentials is None else _basic(credentials)
            token.renew_at = float("inf")
            return
        try:
            self._fetch_token(token, demand, credentials)
        except UpstreamDenied:
            fresh = None if source is None else source.replace(credentials, self._repository.name)
            if fresh is None:
                raise
            self._fetch_token(token, demand, fresh)

    def _fetch_token(self, token: _Token, demand: Demand, credentials: Credentials | None) -> None:
        started = time.monotonic()
        answer = self._request_token(demand, credentials)
        text = answer.get("token") or answer.get("access_token")
        if not (isinstance(text, str) and text.isascii() and text.isprintable()):
            raise UpstreamUnavailable(self._upstream, "its token realm answers without a token")
        life = answer.get("expires_in")
        if isinstance(life, bool) or not isinstance(life, (int, float)) or not life > 0:
            life = _TOKEN_LIFE
        life = min(life, _TOKEN_LIFE_MAX)  # some numbers of JSON are larger than any of a clock
        token.authorization = f"Bearer {text}"
        # Early enough for requests on their way, and not all the time if the life is short.
        token.renew_at = started + life - min(10.0, life / 5)

    def _request_token(self, demand: Demand, credentials: Credentials | None) -> dict[str, object]:
        scheme = upstream_url(demand.realm, self._upstream, what="token realm").scheme
        if scheme not in ("http", "https"):
            raise UpstreamDenied(self._upstream, "its challenge names no token realm", status=401)
        if credentials is not None and scheme == "http" and self._secure:
            reason = "its token realm asks for the password over plain HTTP"
            raise UpstreamForbidden(self._upstream, reason)
        scope = demand.scope or f"repository:{self._repository.name}:pull"
        parameters = [("scope", each) for each in scope.split()]
        if demand.service:
            parameters.insert(0, ("service", demand.service))
        headers = {} if credentials is None else {"Authorization": _basic(credentials)}
        if not self._elsewhere:
            self.session.certify_realm(demand.realm)
        try:
            response = self.session.get(
                demand.realm, params=parameters, headers=headers, stream=True
            )
            if response.status_code != 200:
                raise refuse(response, self._upstream)
            raw = read_bounded(response, _TOKEN_LIMIT)
        except FOREIGN as exc:
            raise translate(exc, self._upstream, self._timeouts) from exc
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            reason = "its token realm does not answer with JSON"
            raise UpstreamUnavailable(self._upstream, reason) from exc
        return answer if isinstance(answer, dict) else {}

    @contextmanager
    def _locked(self, token: _Token) -> Iterator[None]:
        """Held while a token is fetched: other threads wait and use the same one."""
        if not token.lock.acquire(
            timeout=time_left(self._timeouts.connect + self._timeouts.headers)
        ):
            reason = "timed out waiting for another request's token"
            raise UpstreamUnavailable(self._upstream, reason, timed_out=True)
        try:
            yield
        finally:
            token.lock.release()


def _kind(url: str) -> str:
    """`manifests`, `blobs`, `tags` or `referrers`; empty for any other URL."""
    kind = url.partition("?")[0].rpartition("/")[0].rpartition("/")[2]
    return kind if kind in (*_PULL, "tags", "referrers") else ""


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
        self, method: str, url: str, *, headers: dict[str, str], **_: object
    ) -> requests.Response:
        """Called by oras. Raises UpstreamDenied where no anonymous token is to be had."""
        response = self._session.ask(method, url, headers)
        if response.status_code != 401 or not _is_elsewhere(response):
            return response
        auth, url = self._auth(response.url), response.url
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
        known = {**headers, **auth.get_auth_header(url)}
        if known != headers:
            discard(response)
            response = self._session.ask(method, url, known)
            if response.status_code != 401 or _is_elsewhere(response):
                return response
        return self._session.ask(method, url, auth.renew(response, known, url))

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
                elsewhere=True,
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
