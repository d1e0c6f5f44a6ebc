"""Every error that a user, a client or an upstream can cause, in one tree.

OciProxyError
    ConfigError  NameInvalid  DigestInvalid  LockInvalid  VolumeTooSmall  AddressInUse
    NameUnknown  ManifestUnknown  BlobUnknown  NothingMatches  Incomplete
    UpstreamError: UpstreamUnavailable (Interrupted)  UpstreamRateLimited  UpstreamDenied
        UpstreamForbidden  UpstreamInvalid (BlobTooLarge, PageRefused)  UpstreamUntrusted
        ManifestInvalid
    IntegrityError: SizeMismatch  DigestMismatch
    StoreError (StoreFull (NoRoom))  OutputError  LayoutInvalid (LayoutDamaged)  Busy

UpstreamError and IntegrityError are never raised themselves. Each class has the facts that callers
use as attributes, the exit code of the command line, and whether the error is `negative_cacheable`
or `transient`. `ociproxy.serve.errors` has the HTTP statuses. A programming error is not in it.
Tests: tests/test_docs.py, tests/serve/test_limits.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

_NAMED_AT_ONCE: Final = 20
"""Images that one message names: a person reads it."""


class OciProxyError(Exception):
    """Base of everything this program reports in one line instead of a traceback."""

    exit_code = 1
    negative_cacheable = False
    """Whether the same request would fail the same in a few seconds: the answer may be cached."""
    transient = False
    """Whether the same request may succeed later, when the upstream or this server recovers."""


class ConfigError(OciProxyError):
    """The configuration file or an option is wrong; `line` counts from 1, `key` is a key path."""

    exit_code = 2

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        self.reason = reason
        self.file = file
        self.line = line
        self.key = key
        place = f"{file}:{line}" if file and line is not None else file or ""
        super().__init__(": ".join(part for part in (place, key or "", reason) if part))


class NameInvalid(OciProxyError):
    """Text from outside is not a repository name, tag or reference."""

    exit_code = 2

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        self.reason = reason
        super().__init__(f"invalid name {shorten(text)}: {reason}")


class DigestInvalid(OciProxyError):
    """Text from outside is not a digest of an algorithm we verify."""

    exit_code = 2

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        self.reason = reason
        super().__init__(f"invalid digest {shorten(text)}: {reason}")


class NameUnknown(OciProxyError):
    """No upstream may be asked for this registry, or the upstream knows no such repository."""

    exit_code = 3
    negative_cacheable = True

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"{shorten(name)}: {reason}")


class ManifestUnknown(OciProxyError):
    """The manifest is neither stored nor known to the upstream."""

    exit_code = 3
    negative_cacheable = True

    def __init__(self, reference: object, reason: str) -> None:
        self.reference = reference
        self.reason = reason
        super().__init__(f"manifest {reference}: {reason}")


class NothingMatches(OciProxyError):
    """Nothing in the store matches `pattern`; if it is None, the store is empty."""

    exit_code = 3

    def __init__(self, pattern: str | None) -> None:
        self.pattern = pattern
        what = "the store is empty" if pattern is None else f"nothing stored matches {pattern!r}"
        super().__init__(f"{what}; see what there is with ociproxy list")


class BlobUnknown(OciProxyError):
    """The blob is neither stored nor known to the upstream."""

    exit_code = 3
    negative_cacheable = True

    def __init__(self, digest: object, reason: str) -> None:
        self.digest = digest
        self.reason = reason
        super().__init__(f"blob {digest}: {reason}")


class UpstreamError(OciProxyError):
    """The upstream is at fault; `upstream` is its registry name."""

    exit_code = 3
    negative_cacheable = True

    def __init__(self, upstream: str, reason: str) -> None:
        self.upstream = upstream
        self.reason = reason
        super().__init__(f"upstream {upstream}: {reason}")


class UpstreamUnavailable(UpstreamError):
    """No answer, a 5xx or a broken connection.

    `timed_out` tells a silent upstream from a broken one. `unreachable` means that no connection
    was made: the breaker pauses the upstream at once, else only after several failures in a row.
    `unresolved` means that there is no address for its name, which is misspelt perhaps.
    """

    exit_code, transient, negative_cacheable = 75, True, False

    def __init__(
        self,
        upstream: str,
        reason: str,
        *,
        timed_out: bool = False,
        unreachable: bool = False,
        unresolved: bool = False,
    ) -> None:
        self.timed_out = timed_out
        self.unreachable = unreachable or unresolved
        self.unresolved = unresolved
        super().__init__(upstream, reason)


class Interrupted(UpstreamUnavailable):
    """This process gave the request up, or its leader did; the upstream has no part in it."""


class UpstreamRateLimited(UpstreamError):
    """The upstream throttles us (429); it may be asked again after `retry_after` seconds."""

    exit_code, transient, negative_cacheable = 75, True, False

    def __init__(self, upstream: str, reason: str, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(upstream, reason)


class UpstreamDenied(UpstreamError):
    """The upstream refuses our credentials, or wants some where none are configured; `status` is
    401 or 403."""

    def __init__(self, upstream: str, reason: str, *, status: int) -> None:
        self.status = status
        super().__init__(upstream, reason)


class UpstreamForbidden(UpstreamError):
    """The configuration forbids the request, or the address or the scheme to which it leads."""


class UpstreamInvalid(UpstreamError):
    """The answer has a status, an encoding or a redirect that another try would meet again."""


class BlobTooLarge(UpstreamInvalid):
    """The blob has more than `limit` bytes, as announced or as counted."""

    def __init__(self, upstream: str, digest: object, limit: int) -> None:
        self.digest = digest
        self.limit = limit
        super().__init__(upstream, f"blob {digest} is larger than {limit} bytes, fetch.blob_limit")


class PageRefused(UpstreamInvalid):
    """The upstream makes no such page of tags: most often `n` is above its limit. The client has
    to ask for another page, and gets no other list instead."""


class UpstreamUntrusted(UpstreamError):
    """The upstream's certificate is not accepted, ours is not, or ours cannot be used."""


class ManifestInvalid(UpstreamError):
    """The upstream sent no manifest: too large, not JSON, or not of the media type it claims."""


class IntegrityError(OciProxyError):
    """Bytes do not match their descriptor; `subject` names the content that was verified."""

    exit_code = 5
    negative_cacheable = True

    def __init__(self, subject: object, expected: object, actual: object) -> None:
        self.subject = subject
        self.expected = expected
        self.actual = actual
        super().__init__(f"{subject}: expected {self.quantity} {expected}, got {actual}")

    quantity = "value"


class SizeMismatch(IntegrityError):
    """The number of bytes differs."""

    quantity = "size"


class DigestMismatch(IntegrityError):
    """The digest differs."""

    quantity = "digest"


class StoreError(OciProxyError):
    """The store cannot be read or written."""

    exit_code = 4

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"store {path}: {reason}")


class StoreFull(StoreError):
    """No space left where the store lives."""


class NoRoom(StoreFull):
    """An image that was found does not fit there; none of its blobs was asked for."""


class _NamedFile(OciProxyError):
    """What is wrong with a file or folder that the user named: `source`."""

    said = "{source}: {reason}"

    def __init__(self, source: Path | str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(self.said.format(source=source, reason=reason))


class LayoutInvalid(_NamedFile):
    """It is no archive or layout, or one that must not be trusted."""

    exit_code = 5


class LayoutDamaged(LayoutInvalid):
    """The archive is cut off, or broken from some point on; images before that may be whole."""


class AddressInUse(OciProxyError):
    """The server cannot listen on this address."""

    exit_code = 2

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


class Incomplete(OciProxyError):
    """The store lacks parts of images: `gaps` lists them by reference; `remedy` says what to do."""

    exit_code = 3

    def __init__(self, gaps: Mapping[str, Sequence[str]], remedy: str) -> None:
        count = len(gaps)
        lines = [f"incomplete images: {count}; {remedy}"]
        for reference, lacks in islice(gaps.items(), _NAMED_AT_ONCE):
            more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
            lines.append(f"  {reference} lacks {lacks[0]}{more}")
        if count > _NAMED_AT_ONCE:
            lines.append(f"  and {count - _NAMED_AT_ONCE} more")
        super().__init__("\n".join(lines))


class OutputError(_NamedFile):
    """The user asked for the file, and it cannot be written."""

    exit_code = 4
    said = "cannot write {source}: {reason}"


class VolumeTooSmall(OciProxyError):
    """A part that is never split needs a larger volume of an archive; sizes are bytes."""

    exit_code = 2

    def __init__(self, subject: str, limit: int, needed: int) -> None:
        self.needed = needed
        super().__init__(
            f"{subject} does not fit a volume of {limit} bytes: --volume-size {needed} is enough"
        )


class LockInvalid(_NamedFile):
    """It is not a lock, or not one that this version reads."""

    exit_code = 2
    said = "lock {source}: {reason}"


class Busy(OciProxyError):
    """This server is at one of its limits; the client may try again after `retry_after` seconds."""

    exit_code = 75
    transient = True

    def __init__(self, reason: str, *, retry_after: float = 5.0) -> None:
        self.retry_after = retry_after
        super().__init__(reason)


def shorten(text: str, limit: int = 120) -> str:
    """Hostile text as a quoted literal, for one line of a log or of an error."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
