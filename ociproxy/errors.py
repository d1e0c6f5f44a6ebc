"""Every error a user or a client can cause or meet, in one tree.

OciProxyError
  + ConfigError            the configuration file or an option is wrong
  + NameInvalid            text is not a repository name, tag or reference
  + DigestInvalid          text is not a digest
  + NameUnknown            no upstream may be asked for this registry
  + ManifestUnknown        upstream has no such manifest, or we are offline and do not have it
  + NothingMatches         nothing in the store is what was selected
  + BlobUnknown            the same for a blob
  x UpstreamError          the upstream's fault; the base of:
    + UpstreamUnavailable  no answer, a 5xx, a broken connection: the only one worth another try
    + UpstreamRateLimited  429, with the time the upstream asked for
    + UpstreamDenied       401 or 403 to the credentials we have for it
    + UpstreamForbidden    the configuration, or the address it leads to, forbids asking it
    + UpstreamInvalid      an answer that makes no sense, and would make none the next time
      + BlobTooLarge       a blob above `fetch.blob_limit`
    + UpstreamUntrusted    its certificate, or ours, is not accepted
    + ManifestInvalid      too large, not JSON, or not what its media type says
  x IntegrityError         bytes are not what their descriptor says; the base of:
    + SizeMismatch
    + DigestMismatch
  + StoreError             the store cannot be read or written
    + StoreFull            no space left
  + LayoutInvalid          what is to be imported is no image layout, or not one to be trusted
    + LayoutDamaged        it is broken from some point on; what came before may be good
  + AddressInUse           the server cannot listen where it was told to
  + Incomplete             the store lacks part of what is to be exported
  + VolumeTooSmall         something that is never split does not fit a volume of an archive
  + OutputError            a file that was asked for cannot be written
  + Busy                   this server does as much at once as it was told to
  + LockInvalid            a file is not a lock, or not one this program reads

Classes marked x are never raised themselves. Each class carries its facts as attributes, the exit
code the command line ends with, and whether it is `negative_cacheable`; HTTP statuses are the
business of `ociproxy.serve.errors`. A programming error is not in this tree.
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
    """The configuration is wrong; says where."""

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
        place = file or ""
        if file and line is not None:
            place = f"{file}:{line}"
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
    """What the user selects by is not in the store, or nothing is."""

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
    """Something the upstream did; `upstream` is its registry name."""

    exit_code = 3
    negative_cacheable = True

    def __init__(self, upstream: str, reason: str) -> None:
        self.upstream = upstream
        self.reason = reason
        super().__init__(f"upstream {upstream}: {reason}")


class UpstreamUnavailable(UpstreamError):
    """No answer, a 5xx or a broken connection; another try may help.

    `timed_out` tells a silent upstream from a broken one; `unreachable` says that no connection was
    made at all, which is what puts an upstream into its back-off.
    """

    exit_code = 75
    transient = True
    negative_cacheable = False

    def __init__(
        self, upstream: str, reason: str, *, timed_out: bool = False, unreachable: bool = False
    ) -> None:
        self.timed_out = timed_out
        self.unreachable = unreachable
        super().__init__(upstream, reason)


class UpstreamRateLimited(UpstreamError):
    """429 Too Many Requests; `retry_after` is in seconds."""

    exit_code = 75
    transient = True
    negative_cacheable = False

    def __init__(self, upstream: str, reason: str, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(upstream, reason)


class UpstreamDenied(UpstreamError):
    """The upstream refuses the credentials configured for it, or asks for some; `status` is its."""

    def __init__(self, upstream: str, reason: str, *, status: int) -> None:
        self.status = status
        super().__init__(upstream, reason)


class UpstreamForbidden(UpstreamError):
    """The configuration forbids the question; or the upstream, a redirect or a token realm leads
    to an address or a scheme that we refuse to use."""


class UpstreamInvalid(UpstreamError):
    """What it answers is of no use: a status, an encoding or a redirect that another try would
    meet again."""


class BlobTooLarge(UpstreamInvalid):
    """A blob of more bytes than `limit`, whether it says so or not."""

    def __init__(self, upstream: str, digest: object, limit: int) -> None:
        self.digest = digest
        self.limit = limit
        super().__init__(upstream, f"blob {digest} is larger than {limit} bytes, fetch.blob_limit")


class UpstreamUntrusted(UpstreamError):
    """The TLS handshake failed over a certificate: another try cannot help."""


class ManifestInvalid(UpstreamError):
    """What came is not a manifest: too large, not JSON, or another media type than it says."""


class IntegrityError(OciProxyError):
    """Bytes are not what their descriptor says; `subject` names what was verified."""

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


class LayoutInvalid(OciProxyError):
    """What is to be imported is not an archive or a layout, or none to be trusted; `source` names
    it."""

    exit_code = 5

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"{source}: {reason}")


class LayoutDamaged(LayoutInvalid):
    """An archive that is cut off, or broken from some point on; what came before may be good."""


class AddressInUse(OciProxyError):
    """The server cannot listen on this address."""

    exit_code = 2

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host = host
        self.port = port
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


class Incomplete(OciProxyError):
    """The store lacks part of images; `gaps` says by reference what, `remedy` what to do."""

    exit_code = 3

    def __init__(self, gaps: Mapping[str, Sequence[str]], remedy: str) -> None:
        self.gaps = gaps
        self.remedy = remedy
        count = len(gaps)
        lines = [f"{count} {'image is' if count == 1 else 'images are'} incomplete; {remedy}"]
        for reference, lacks in islice(gaps.items(), _NAMED_AT_ONCE):
            more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
            lines.append(f"  {reference} lacks {lacks[0]}{more}")
        if count > _NAMED_AT_ONCE:
            lines.append(f"  and {count - _NAMED_AT_ONCE} more")
        super().__init__("\n".join(lines))


class OutputError(OciProxyError):
    """A file that the user asked for cannot be written."""

    exit_code = 4

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"cannot write {path}: {reason}")


class VolumeTooSmall(OciProxyError):
    """Something that is never split needs a larger volume; sizes are in bytes."""

    exit_code = 2

    def __init__(self, subject: str, limit: int, needed: int) -> None:
        self.subject = subject
        self.limit = limit
        self.needed = needed
        super().__init__(
            f"{subject} does not fit a volume of {limit} bytes: --volume-size {needed} is enough"
        )


class LockInvalid(OciProxyError):
    """A file is not a lock; `source` names it."""

    exit_code = 2

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"lock {source}: {reason}")


class Busy(OciProxyError):
    """A limit of this server is reached; `retry_after` is in seconds."""

    exit_code = 75
    transient = True

    def __init__(self, reason: str, *, retry_after: float = 5.0) -> None:
        self.retry_after = retry_after
        super().__init__(reason)


def shorten(text: str, limit: int = 120) -> str:
    """Hostile text, fit for one line of a log or an error body."""
    printable = text if len(text) <= limit else text[: limit - 3] + "..."
    return repr(printable)
