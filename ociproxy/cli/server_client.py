"""How a command asks the admin listener of a running server: its address, password, and errors.

Tests: tests/serve/admin/test_load.py, tests/cli/test_why_command.py.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import click

from ociproxy.config.reading import decode, read_file
from ociproxy.errors import ConfigError, OciProxyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_REFUSAL: Final = 4 * 1024 * 1024
"""Bytes that are read of an answer that refuses the request."""
_PASSWORD_FILE: Final = 4096
"""Bytes of a file with a user and a password."""
_LATER: Final = (408, 429, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_HINTS: Final = {
    401: "; --server-auth FILE has USER:PASSWORD",
    404: "; is it the admin listener, serve.admin, of a server of this version?",
}

server_auth_option = click.option(
    "--server-auth",
    "server_auth",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="OCIPROXY_SERVER_AUTH",
    help="File with USER:PASSWORD for the listener of --server.",
)


class ServerRefused(OciProxyError):
    """The server does not take the request; it would not take it again."""

    exit_code = 2


class ServerUnavailable(OciProxyError):
    """No answer, a broken connection, or a server that is busy."""

    exit_code = 75
    transient = True


class AdminListener:
    """That of the server at a URL. Raises ConfigError where the URL, or the file with the password,
    is wrong."""

    def __init__(self, url: str, auth: Path | None) -> None:
        self.url = url
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as exc:
            raise ConfigError(f"--server: {exc}") from exc
        if parts.scheme not in ("http", "https") or not self._host:
            raise ConfigError("--server: write it as http://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "--server: a password there is seen by all users of this machine: use --server-auth"
            )
        if parts.query or parts.fragment:
            raise ConfigError("--server: a URL without a query")
        self._secure = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        self._headers = {} if auth is None else {"Authorization": f"Basic {_credentials(auth)}"}

    @contextlib.contextmanager
    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer, whose status is 200, to be read inside. No redirect is followed. `timeout` is
        the seconds for which the server may say nothing. Raises ServerRefused, ServerUnavailable.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        try:
            with contextlib.closing(kind(self._host, self._port, timeout=timeout)) as connection:
                connection.request(
                    method, f"{self._prefix}{path}", body, {**self._headers, **(headers or {})}
                )
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise self._refusal(response)
                    yield response
        except ssl.SSLCertVerificationError as exc:
            raise ServerRefused(f"{self.url}: {exc.verify_message}") from exc
        except (OSError, http.client.HTTPException) as exc:
            said = exc.strerror if isinstance(exc, OSError) else None
            reason = (said or str(exc) or type(exc).__name__).lower()
            raise ServerUnavailable(f"{self.url}: {reason}") from exc

    def _refusal(self, response: http.client.HTTPResponse) -> OciProxyError:
        reason = response.reason
        with contextlib.suppress(ValueError, LookupError, TypeError):
            reason = str(json.loads(response.read(_REFUSAL))["errors"][0]["message"])
        text = f"{self.url} answers {response.status}: {reason}{_HINTS.get(response.status, '')}"
        return (ServerUnavailable if response.status in _LATER else ServerRefused)(text)


def _credentials(path: Path) -> str:
    """As a header has them. Raises ConfigError."""
    text = decode(read_file(path, _PASSWORD_FILE), str(path)).strip("\r\n")
    user, colon, password = text.partition(":")
    if not (user and colon and password) or len(text.splitlines()) > 1:
        raise ConfigError("not one line with USER:PASSWORD", file=str(path))
    return base64.b64encode(text.encode()).decode("ascii")
