"""What skopeo says, as it was seen to say it, and what becomes of it."""

from __future__ import annotations

import pytest

from ociproxy.errors import (
    BlobUnknown,
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.skopeo.errors import SkopeoStderr, translate
from ociproxy.oci.digest import Digest

UPSTREAM = "registry.example"
HEX = "954d03c213f0ee56d309f19ede563701acb0a930bdc8be1d2b586bec7f62ff9f"
OTHER = "a6497afbcb5f20b8ab683eeb701b73c0923e08f0b4d4683398ca96b240c9e9e4"
PARSING = 'Error parsing image name \\"docker://r.example/team/app:v1\\": '
READING = f"{PARSING}reading manifest v1 in r.example/team/app: "
PINGING = f'{PARSING}pinging container registry r.example: Get \\"https://r.example/v2/\\": '
BLOB = f"reading blob sha256:{HEX}: Error fetching blob: invalid status code from registry "


def said(*lines: str) -> SkopeoStderr:
    made = SkopeoStderr()
    text = "".join(f'time="2026-11-24T07:38:05Z" level={line}\n' for line in lines)
    for piece in (text[:7], text[7:90], text[90:]):
        made.feed(piece.encode())
    made.end()
    return made


def fatal(message: str) -> SkopeoStderr:
    return said('debug msg="GET https://r.example/v2/"', f'fatal msg="{message}"')


def error(message: str) -> OciProxyError:
    return translate(fatal(message), UPSTREAM, ManifestUnknown("team/app:v1", "unknown"))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (f"{READING}manifest unknown: manifest unknown", ManifestUnknown),
        (f"{READING}name unknown: repository name not known to registry", OciProxyError),
        ("fetching tags list: invalid status code from registry 404 (Not Found)", ManifestUnknown),
        (f"{BLOB}404 (Not Found)", BlobUnknown),
        (f"{BLOB}403 (Forbidden)", UpstreamDenied),
        (f"{READING}unauthorized: authentication required", UpstreamDenied),
        ("unable to retrieve auth token: invalid username/password: x", UpstreamDenied),
        (f"{READING}denied: requested access to the resource is denied", UpstreamDenied),
        (f"{READING}toomanyrequests: You have reached your pull rate limit", UpstreamRateLimited),
        (f"{PINGING}x509: certificate signed by unknown authority", UpstreamUntrusted),
        (f"{PINGING}remote error: tls: bad certificate", UpstreamUntrusted),
        (f"{PARSING}exceeded maximum allowed size of 4194304 bytes", ManifestInvalid),
        (
            f"writing blob: happened during read: Digest did not match, "
            f"expected sha256:{HEX}, got sha256:{OTHER}",
            DigestMismatch,
        ),
        ("writing blob: happened during read: unexpected EOF", UpstreamUnavailable),
        (f"{READING}received unexpected HTTP status: 500 Internal", UpstreamUnavailable),
        (f"{READING}unknown: the registry says no more", UpstreamInvalid),
        (f"{READING}unsupported: The operation is unsupported.", UpstreamInvalid),
        (f"{READING}received unexpected HTTP status: 501 Not Implemented", UpstreamInvalid),
        ("something new", UpstreamUnavailable),
        ("", UpstreamUnavailable),
    ],
)
def test_kind_of_error(message: str, kind: type[OciProxyError]) -> None:
    assert isinstance(error(message), kind)


@pytest.mark.parametrize(
    ("message", "timed_out", "unreachable"),
    [
        ("dial tcp 127.0.0.1:1: connect: connection refused", False, True),
        ("dial tcp: lookup r.example on 10.0.0.1:53: no such host", False, True),
        ("http: server gave HTTP response to HTTPS client", False, True),
        ("dial tcp 10.1.1.1:443: i/o timeout", True, False),
        ("context deadline exceeded", True, False),
        ("EOF", False, False),
    ],
)
def test_kind_of_unavailable(message: str, timed_out: bool, unreachable: bool) -> None:
    found = error(f"{PINGING}{message}")
    assert isinstance(found, UpstreamUnavailable)
    assert (found.timed_out, found.unreachable) == (timed_out, unreachable)


def test_culprits_are_named() -> None:
    unknown = error(f"{BLOB}404 (Not Found)")
    assert isinstance(unknown, BlobUnknown)
    assert unknown.digest == Digest.parse(f"sha256:{HEX}")


def test_reason_is_one_short_line_without_secrets() -> None:
    url = "https://user:secret@r.example/token?account=user&signature=secret"
    found = error(f'Get \\"{url}\\": EOF\\n{"x" * 1000}')
    assert "secret" not in str(found)
    assert "r.example/token" in str(found)
    assert len(str(found)) < 400
    assert "\n" not in str(found)


def test_throttled_run_knows_how_long() -> None:
    made = said(
        'debug msg="Detected \'Retry-After\' header \\"7\\""',
        'debug msg="Too many requests to http://r.example/v2/: sleeping for 7.000000 seconds"',
    )
    assert made.throttled
    found = translate(made, UPSTREAM, ManifestUnknown("x", "y"))
    assert isinstance(found, UpstreamRateLimited)
    assert found.retry_after == 7


def test_content_type_and_first_answer() -> None:
    made = said(
        'debug msg="Ping https://r.example/v2/ status 401"',
        'debug msg="Content-Type from manifest GET is \\"application/x; a=b\\""',
    )
    assert made.content_type == "application/x; a=b"
    assert made.answered
    assert not said('debug msg="Ping https://r.example/v2/ err Get: EOF"').answered


def test_words_without_a_logger() -> None:
    made = SkopeoStderr()
    made.feed(b"panic: runtime error\ngoroutine 1\n")
    made.end()
    assert made.fatal == "panic: runtime error"


def test_long_line_is_bounded() -> None:
    made = SkopeoStderr()
    for _ in range(100):
        made.feed(b"x" * 65536)
    assert len(made._rest) <= 65536
