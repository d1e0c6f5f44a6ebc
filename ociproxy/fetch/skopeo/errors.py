"""skopeo's standard error, translated into our errors.

The messages are those of Go and the containers/image library (1.9 to 1.18 were read). They are no
interface: an unknown message becomes UpstreamUnavailable with skopeo's own words. skopeo runs with
`--debug`, since only there does it show a manifest's Content-Type, and a 429 that it waits out.
Without these lines, the document's own media type and the time limit decide.
"""

from __future__ import annotations

import re
from typing import Final

from ociproxy.errors import (
    BlobUnknown,
    DigestInvalid,
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.retry import clamp_retry_after
from ociproxy.oci.digest import Digest

_LINE_LIMIT: Final = 64 * 1024
"""Bytes kept of an unfinished line, far more than a real one: a longer one loses its beginning."""

_FATAL: Final = re.compile(r'level=(?:fatal|panic) msg="((?:[^"\\]|\\.)*)"')
_CONTENT_TYPE: Final = re.compile(r'Content-Type from manifest GET is \\"([^"\\]*)\\"')
_PING: Final = re.compile(r"Ping \S+ status \d")
_RETRY_AFTER: Final = re.compile(r"Detected 'Retry-After' header \\\"(\d{1,9})\\\"")
_THROTTLED: Final = re.compile(r"Too many requests to .*sleeping for")

_REASON_LIMIT: Final = 300
"""Characters of an error's reason: an image's name and a sentence fit in."""

_MISMATCH: Final = re.compile(r"[Dd]igest did not match, expected (\S+), got (\S+)")
_BLOB: Final = re.compile(r"reading blob (\S+:[0-9a-f]{32,})")
_URL: Final = re.compile(r"(https?://)(?:[^/\s@\"]*@)?([^?\s\"]*)\?[^\s\"]*")

_DENIED: Final = {
    401: ("unauthorized", "authentication required", "invalid username/password"),
    403: ("denied:", "access to the resource is denied", "403 (forbidden)"),
}
_ABSENT: Final = (
    "404 (not found)",
    "manifest unknown",
    "name unknown",
    "blob unknown",
    "not known to registry",
)
_REFUSED: Final = (": unknown: ", "unsupported: ", "http status: 501", "http status: 505")
"""A final answer: skopeo shows the code of a 4xx, and the status of a 5xx."""
_UNREACHABLE: Final = (
    "connection refused",
    "no route to host",
    "network is unreachable",
    "server gave http response to https client",
    "first record does not look like a tls handshake",
)
_TIMED_OUT: Final = ("i/o timeout", "handshake timeout", "deadline exceeded", "awaiting headers")
_UNTRUSTED: Final = ("x509:", "certificate", "tls: handshake failure", "tls: unknown")
_NO_MANIFEST: Final = ("manifest does not match", "manifest digest")


class SkopeoStderr:
    """The facts in one run's output so far. It is the upstream's text and may hold secrets: only
    `fatal` goes into an error, by way of `translate`."""

    def __init__(self) -> None:
        self.fatal = ""
        self.content_type = ""
        self.answered = False
        """Whether the upstream has answered a request."""
        self.throttled = False
        self.retry_after: float | None = None
        """Seconds, if the upstream named a time."""
        self._rest = b""
        self._other = ""

    def feed(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_LINE_LIMIT:]
        for line in lines:
            self._take(line.decode("utf-8", "replace"))

    def end(self) -> None:
        """The output has ended."""
        self.feed(b"\n")
        if not self.fatal:
            # skopeo ended before it had a logger, by a wrong option or a crash.
            self.fatal = self._other

    def _take(self, line: str) -> None:
        if found := _FATAL.search(line):
            self.fatal = re.sub(r"\\(.)", r"\1", found[1])
        elif found := _CONTENT_TYPE.search(line):
            self.content_type = found[1]
        elif found := _RETRY_AFTER.search(line):
            self.retry_after = float(found[1])
        elif _THROTTLED.search(line):
            self.throttled = True
        elif _PING.search(line):
            self.answered = True
        elif line.strip() and " level=" not in line and not self._other:
            self._other = line.strip()


def translate(stderr: SkopeoStderr, upstream: str, unknown: OciProxyError) -> OciProxyError:
    """The domain error of a run that failed; `unknown` is the caller's, for a 404."""
    words = stderr.fatal.lower()
    reason = _shown(stderr.fatal) or "skopeo failed and does not say why"
    if stderr.throttled or "too many requests" in words or "toomanyrequests" in words:
        return rate_limited(stderr, upstream)
    if found := _MISMATCH.search(stderr.fatal):
        return DigestMismatch("blob", _digest(found[1]), found[2].rstrip(".,"))
    if any(sign in words for sign in _UNTRUSTED):
        return UpstreamUntrusted(upstream, reason)
    for status, signs in _DENIED.items():
        if any(sign in words for sign in signs):
            return UpstreamDenied(upstream, reason, status=status)
    if any(sign in words for sign in _ABSENT):
        return _unknown(stderr.fatal, unknown)
    if any(sign in words for sign in _REFUSED):
        return UpstreamInvalid(upstream, reason)
    if "invalid reference format" in words or "repository name must" in words:
        return NameUnknown(upstream, f"skopeo accepts no such name: {reason}")
    if "exceeded maximum allowed size" in words:
        return ManifestInvalid(upstream, f"a document is too large: {reason}")
    if any(sign in words for sign in _NO_MANIFEST):
        return ManifestInvalid(upstream, reason)
    if "no such host" in words:
        return UpstreamUnavailable(upstream, "name does not resolve", unresolved=True)
    return UpstreamUnavailable(
        upstream,
        reason,
        timed_out=any(sign in words for sign in _TIMED_OUT),
        unreachable=any(sign in words for sign in _UNREACHABLE),
    )


def rate_limited(stderr: SkopeoStderr, upstream: str) -> UpstreamRateLimited:
    retry_after = clamp_retry_after(stderr.retry_after)
    return UpstreamRateLimited(upstream, "answers 429 Too Many Requests", retry_after=retry_after)


def _unknown(words: str, unknown: OciProxyError) -> OciProxyError:
    """`unknown`, unless the words say that a blob or the repository is unknown."""
    if found := _BLOB.search(words):
        digest = _digest(found[1])
        if isinstance(digest, Digest):
            return BlobUnknown(digest, "unknown to the upstream")
    name = "name unknown" in words or "repository name not known" in words
    if name and isinstance(unknown, ManifestUnknown):
        return NameUnknown(str(unknown.reference), "the upstream knows no such repository")
    return unknown


def _digest(text: str) -> Digest | str:
    try:
        return Digest.parse(text.rstrip(".,:"))
    except DigestInvalid:
        return text


def _shown(text: str) -> str:
    """Printable, short, and without the parts of a URL that may be secret."""
    text = _URL.sub(r"\1\2", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    # This prefix repeats the image's name; the cause comes at the end.
    text = re.sub(r'^Error parsing image name "[^"]*": ', "", text)
    return text if len(text) <= _REASON_LIMIT else f"{text[: _REASON_LIMIT - 3]}..."
