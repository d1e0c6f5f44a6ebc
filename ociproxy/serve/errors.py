"""Domain errors on the wire: the one mapping to status and code, and the one writer of error
bodies.

Codes are those of the distribution-spec ("Error codes") where it has one; UNAVAILABLE, UNKNOWN,
RANGE_INVALID and PAGINATION_NUMBER_INVALID are those of Docker's registry; REQUEST_INVALID is this
project's. An upstream that refuses our credentials is a 403: a 401 is only for the client's own.

Tests: tests/serve/test_openapi.py, tests/test_docs.py.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Final

from aiohttp import web

from ociproxy.errors import (
    BlobUnknown,
    Busy,
    DigestInvalid,
    IntegrityError,
    ManifestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    OciProxyError,
    PageRefused,
    StoreError,
    UpstreamDenied,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)


class Unsupported(OciProxyError):
    """A write, or a part of the API that a pull-only mirror does not have; `status` is 404 or
    405."""

    def __init__(self, reason: str, *, status: int) -> None:
        self.status = status
        super().__init__(reason)


class QueryInvalid(OciProxyError):
    """The `n` of a request for tags is no count."""


class Unauthorized(OciProxyError):
    """`serve.auth` is set, and the client sent no credentials or wrong ones."""


class LoadRefused(OciProxyError):
    """The configuration forbids that this client has images loaded."""


class RequestInvalid(OciProxyError):
    """The client sent bytes that are no HTTP request or no list (`status` 400), that are too many
    (413, 431), too slow (408) or of another media type (415)."""

    def __init__(self, reason: str, *, status: int) -> None:
        self.status = status
        super().__init__(reason)


class ResponseCut(OciProxyError):
    """This side ended a response after its headers were sent: for the log only."""


STATUS: Final[dict[type[OciProxyError], tuple[int, str]]] = {
    NameInvalid: (400, "NAME_INVALID"),
    DigestInvalid: (400, "DIGEST_INVALID"),
    QueryInvalid: (400, "PAGINATION_NUMBER_INVALID"),
    PageRefused: (400, "PAGINATION_NUMBER_INVALID"),
    NameUnknown: (404, "NAME_UNKNOWN"),
    ManifestUnknown: (404, "MANIFEST_UNKNOWN"),
    BlobUnknown: (404, "BLOB_UNKNOWN"),
    Unsupported: (405, "UNSUPPORTED"),
    RequestInvalid: (400, "REQUEST_INVALID"),
    Unauthorized: (401, "UNAUTHORIZED"),
    UpstreamDenied: (403, "DENIED"),
    UpstreamForbidden: (403, "DENIED"),
    LoadRefused: (403, "DENIED"),
    UpstreamRateLimited: (429, "TOOMANYREQUESTS"),
    UpstreamUnavailable: (502, "UNAVAILABLE"),
    UpstreamUntrusted: (502, "UNAVAILABLE"),
    ManifestInvalid: (502, "MANIFEST_INVALID"),
    UpstreamInvalid: (502, "UNKNOWN"),
    UpstreamError: (502, "UNKNOWN"),
    IntegrityError: (502, "UNKNOWN"),
    StoreError: (503, "UNAVAILABLE"),
    Busy: (503, "UNAVAILABLE"),
}
"""The most specific class decides; a time-out of an upstream is 504 instead of 502."""

RANGE_INVALID: Final = "RANGE_INVALID"
SERVER: Final = "ociproxy"
"""The Server header. It names neither the library nor a version: attackers look for both."""
_CHALLENGE: Final = 'Basic realm="ociproxy", charset="UTF-8"'


def status_and_code(error: OciProxyError) -> tuple[int, str]:
    for kind in type(error).__mro__:
        found = STATUS.get(kind)
        if found is None:
            continue
        status, code = found
        if isinstance(error, UpstreamUnavailable) and error.timed_out:
            status = 504
        if isinstance(error, Unsupported | RequestInvalid):
            status = error.status
        return status, code
    return 500, "UNKNOWN"


def error_response(error: OciProxyError) -> web.Response:
    status, code = status_and_code(error)
    headers = {}
    if isinstance(error, UpstreamRateLimited | Busy):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if status == 405:
        headers["Allow"] = "GET, HEAD"
    if status == 401:
        headers["WWW-Authenticate"] = _CHALLENGE
    return _response(status, code, str(error), headers)


def internal_error() -> web.Response:
    """500 for a bug: the log has the traceback, the client gets no detail."""
    return _response(500, "UNKNOWN", "internal error, see the mirror's log", {})


def range_response(size: int) -> web.Response:
    """416 (RFC 9110 section 15.5.17), with the size of the blob in bytes."""
    headers = {"Content-Range": f"bytes */{size}"}
    return _response(416, RANGE_INVALID, f"the blob has {size} bytes", headers)


def _response(status: int, code: str, message: str, headers: dict[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=_body(code, message),
        headers={**headers, "Content-Type": "application/json", "Server": SERVER},
    )


def last_words(error: OciProxyError) -> bytes:
    """A whole response as bytes, for a connection that ends without a request to answer."""
    status, code = status_and_code(error)
    body = _body(code, str(error))
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Server: {SERVER}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _body(code: str, message: str) -> bytes:
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]})
    return body.encode() + b"\n"
