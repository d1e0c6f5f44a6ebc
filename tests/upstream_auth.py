"""How a fake upstream asks for credentials: basic, or tokens that are good for one repository."""

from __future__ import annotations

import base64
import itertools
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from aiohttp import web


class Auth(Protocol):
    def challenge(self, request: web.Request, repository: str) -> str | None:
        """The WWW-Authenticate value for a request that may not pass; None lets it pass."""
        ...


@dataclass(frozen=True, slots=True)
class BasicAuth:
    user: str
    password: str

    def challenge(self, request: web.Request, repository: str) -> str | None:
        return None if self.given(request) else 'Basic realm="fake upstream"'

    def given(self, request: web.Request) -> bool:
        pair = f"{self.user}:{self.password}".encode()
        expected = "Basic " + base64.b64encode(pair).decode()
        return request.headers.get("Authorization") == expected


@dataclass(slots=True, kw_only=True)
class TokenAuth:
    """The bearer scheme of the distribution spec. Every fake upstream serves `/token` for its own.

    A token is good for the one repository it was asked for: the same token on another repository
    is answered with a new challenge, which is how a shared authentication state is found out.
    """

    credentials: BasicAuth | None = None
    expires_in: float = 300.0
    say_expires_in: bool = True
    answer_as: Literal["token", "access_token"] = "token"
    realm: str | None = None
    """Where tokens are given out; None is the upstream itself."""
    list_action: str = "pull"
    """The action of the scope that lists of tags ask for."""
    silent: int | None = None
    """Answer this status without a challenge, but for `/v2/`, which alone challenges."""
    service: str = "fake.example"
    issued: list[tuple[str, str]] = field(default_factory=list)
    """(repository, token) in the order of issue."""
    _valid: dict[str, tuple[str, float]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def challenge(self, request: web.Request, repository: str) -> str | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        error = ""
        if scheme.lower() == "bearer":
            owner, until = self._valid.get(token, ("", 0.0))
            if owner == self._scope(request, repository) and time.monotonic() < until:
                return None
            error = "insufficient_scope" if owner else "invalid_token"
        realm = self.realm or f"{request.scheme}://{request.host}/token"
        parts = {"realm": realm, "service": self.service}
        if repository:
            parts["scope"] = self._scope(request, repository)
        if error:
            parts["error"] = error
        return "Bearer " + ",".join(f'{key}="{value}"' for key, value in parts.items())

    def _scope(self, request: web.Request, repository: str) -> str:
        action = self.list_action if request.path.endswith("/tags/list") else "pull"
        return f"repository:{repository}:{action}"

    def expire_all(self) -> None:
        self._valid.clear()

    def issue(self, request: web.Request) -> web.Response:
        if self.credentials is not None and not self.credentials.given(request):
            return web.json_response({"errors": [{"code": "UNAUTHORIZED"}]}, status=401)
        scope = request.query.get("scope", "")
        repository = scope.removeprefix("repository:").rpartition(":")[0]
        # Anonymous or not, a token names its repository, so that a leak shows in a request log.
        token = f"token-{next(self._numbers)}-{repository.replace('/', '.')}"
        self._valid[token] = (scope, time.monotonic() + self.expires_in)
        self.issued.append((repository, token))
        answer: dict[str, object] = {self.answer_as: token}
        if self.say_expires_in:
            answer["expires_in"] = int(self.expires_in)
        return web.json_response(answer)
