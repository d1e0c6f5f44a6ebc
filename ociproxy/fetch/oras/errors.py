"""Failures of the libraries and of the upstream as domain errors: `translate` for exceptions,
`refuse` for statuses.

Reasons are short and for people. A reason may quote the upstream's own error message. It never
quotes a header or the query of a URL, where presigned URLs carry secrets.

Tests: tests/fetch/oras/test_backend.py, tests/fetch/oras/test_tls.py.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from typing import TYPE_CHECKING, Final

import requests
import urllib3
from requests.exceptions import RequestException, TooManyRedirects
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    NewConnectionError,
    ReadTimeoutError,
)

from ociproxy.clock import OutOfTime, out_of_time
from ociproxy.errors import (
    NameUnknown,
    OciProxyError,
    PageRefused,
    UpstreamDenied,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.oras.connect import LookupTimeout
from ociproxy.fetch.oras.session import read_bounded
from ociproxy.fetch.retry import clamp_retry_after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Timeouts
    from ociproxy.oci.reference import Repository

FOREIGN: Final = (RequestException, HTTPError, http.client.HTTPException, OSError, UnicodeError)
"""All that requests, urllib3, http.client, ssl and sockets raise for failures of an upstream."""

_ERROR_BODY_LIMIT: Final = 16 * 1024
"""Bytes read of an error body; a longer one is not parsed."""
_MESSAGE_LIMIT: Final = 200
"""Characters quoted of an upstream's message: a sentence or two in one log line."""

_TRANSIENT_4XX: Final = (408, 425)
"""The server's own time-out (RFC 9110), and too early (RFC 8470): another try may succeed."""
_FINAL_5XX: Final = (501, 505)
"""Not implemented, and HTTP version not supported: another try gets the same answer."""

_PAGE_REFUSED: Final = "PAGINATION_NUMBER_INVALID"

_CERTIFICATE_ALERTS: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")
"""OpenSSL's names of alerts by which a server refuses the mirror's certificate or its absence."""
_NO_TLS: Final = "WRONG_VERSION_NUMBER"
"""OpenSSL's name for an answer that is not TLS, mostly plain HTTP."""

_SENT: Final = {
    "": "; it was asked without credentials",
    "basic": "; it does not accept the mirror's credentials",
}
"""Why a 401 came, by the scheme of the Authorization that was sent. A refused token tells nothing:
the realm may have given it with or without credentials."""


def translate(
    exc: BaseException, upstream: str, timeouts: Timeouts, *, body: bool = False
) -> OciProxyError:
    """The domain error for one of FOREIGN; `body` says that the headers had come."""
    causes = list(_causes(exc))
    late = next((cause for cause in causes if isinstance(cause, OutOfTime)), None) or out_of_time()
    if late is not None:
        # Whatever was being waited for had what the waits before it had left.
        return UpstreamUnavailable(upstream, str(late), timed_out=True)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return UpstreamUntrusted(upstream, f"certificate verify failed: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError) and _is_certificate_alert(cause):
            reason = f"refuses our client certificate or the lack of one: {_tls_words(cause)}"
            return UpstreamUntrusted(upstream, reason)
    if isinstance(exc, TooManyRedirects):
        return UpstreamInvalid(upstream, "redirects in circles")
    # A handshake that fails for another reason met a server that speaks no TLS.
    unreachable = isinstance(exc, requests.exceptions.SSLError)
    blamed = _proxy_in(causes)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return UpstreamUnavailable(upstream, f"{blamed}name does not resolve", unresolved=True)
        if isinstance(cause, NewConnectionError):
            unreachable = True
        elif isinstance(cause, LookupTimeout):
            reason = f"{blamed}timed out after {timeouts.connect:g} s looking up its name"
            return UpstreamUnavailable(upstream, reason, timed_out=True, unreachable=True)
        elif isinstance(cause, ConnectTimeoutError):
            reason = f"{blamed}timed out after {timeouts.connect:g} s connecting"
            return UpstreamUnavailable(upstream, reason, timed_out=True, unreachable=True)
        elif isinstance(cause, (TimeoutError, ReadTimeoutError)):
            reason = f"timed out after {timeouts.headers:g} s waiting for headers"
            if body:
                reason = f"timed out after {timeouts.stall:g} s without data"
            return UpstreamUnavailable(upstream, reason, timed_out=True)
    reason = f"{blamed}{_reason(causes)}"
    if not body and any(getattr(cause, "reason", None) == _NO_TLS for cause in causes):
        reason += "; plain HTTP needs `scheme: http`, or http:// in its `endpoint`"
    return UpstreamUnavailable(upstream, reason, unreachable=unreachable)


def refuse(
    response: requests.Response,
    upstream: str,
    *,
    unknown: OciProxyError | None = None,
    repository: Repository | None = None,
) -> OciProxyError:
    """The domain error for an answer that is not a success. `unknown` is the error for a 404,
    except that NameUnknown is, if `repository` is given and the upstream says that the repository
    is unknown. Reads a small body, to keep the connection."""
    status = response.status_code
    code, message = _error_body(response)
    reason = f"{response.request.method} {plain_url(response.url)} answered {status}"
    if code or message:
        reason = f"{reason}: {': '.join(part for part in (code, message) if part)}"
    if status == 401 and not response.history:  # a redirect's target may have got no credentials
        sent = response.request.headers.get("Authorization", "")
        reason += _SENT.get(sent.partition(" ")[0].lower(), "")
    if status in (401, 403):
        return UpstreamDenied(upstream, reason, status=status)
    if status == 429 or code == "TOOMANYREQUESTS":
        return UpstreamRateLimited(upstream, reason, retry_after=_retry_after(response))
    if status == 404 and code == "NAME_UNKNOWN" and repository is not None:
        return NameUnknown(str(repository), "the upstream knows no such repository")
    if status in (404, 410) and unknown is not None:
        return unknown
    if status == 400 and (code == _PAGE_REFUSED or _asked_for_a_page(response)):
        return PageRefused(upstream, reason)
    if (status >= 500 and status not in _FINAL_5XX) or status in _TRANSIENT_4XX:
        return UpstreamUnavailable(upstream, reason)
    return UpstreamInvalid(upstream, reason)


def _asked_for_a_page(response: requests.Response) -> bool:
    """Not every registry has the specification's code for it."""
    path, _, query = (response.request.path_url or "").partition("?")
    return path.endswith("/tags/list") and "n=" in query


def plain_url(url: str | None) -> str:
    """Without userinfo, query and fragment."""
    parts = urllib3.util.parse_url(url or "")
    return parts._replace(auth=None, query=None, fragment=None).url


def _error_body(response: requests.Response) -> tuple[str, str]:
    """Code and message of the first error in the specification's JSON; empty for any other body."""
    try:
        document = json.loads(read_bounded(response, _ERROR_BODY_LIMIT))
        first = document["errors"][0]
        code, message = first.get("code"), first.get("message")
    except (*FOREIGN, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", ""
    return _printable(code), _printable(message)


def _printable(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:_MESSAGE_LIMIT]).strip()


def _retry_after(response: requests.Response) -> float:
    try:
        seconds = urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", ""))
    except (InvalidHeader, ValueError, OverflowError):
        return clamp_retry_after(None)
    return clamp_retry_after(float(seconds))


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """The exception and all its causes, which the libraries also keep in arguments."""
    seen: set[int] = set()
    waiting: list[object] = [exc]
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]


def _proxy_in(causes: list[BaseException]) -> str:
    """The beginning of a reason that blames the proxy, where no connection to it was made."""
    for cause in causes:
        if isinstance(cause, ConnectTimeoutError):
            # NewConnectionError, which is one, has it as an attribute, the others as an argument.
            proxy = getattr(getattr(cause, "conn", cause.args[0]), "proxy", None)
            if proxy is not None:
                return f"the proxy {proxy.scheme}://{proxy.netloc}: "
    return ""


def _is_certificate_alert(exc: ssl.SSLError) -> bool:
    reason = exc.reason or ""
    return "ALERT" in reason and any(name in reason for name in _CERTIFICATE_ALERTS)


def _tls_words(exc: ssl.SSLError) -> str:
    return (exc.reason or "").replace("_", " ").lower()


def _reason(causes: list[BaseException]) -> str:
    """The words of the innermost OS or TLS error, without numbers and object names."""
    for cause in reversed(causes):
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return f"TLS failed: {_tls_words(cause)}"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        if isinstance(cause, http.client.RemoteDisconnected):
            return "connection closed without an answer"
        if isinstance(cause, http.client.IncompleteRead):
            return "connection closed before the end of the body"
        if isinstance(cause, OSError) and str(cause).startswith("Tunnel connection failed"):
            return f"the proxy says: {_printable(str(cause))}"
    return f"broken answer ({type(causes[-1]).__name__})"
