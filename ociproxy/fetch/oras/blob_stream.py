"""The body of one answer to a blob request: where it lies in the blob, and its bytes.

Tests: tests/fetch/oras/test_backend.py, tests/fetch/oras/test_connect.py.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

from ociproxy.errors import UpstreamError, UpstreamInvalid, UpstreamUnavailable
from ociproxy.fetch.oras.errors import FOREIGN, translate
from ociproxy.fetch.oras.session import content_length

if TYPE_CHECKING:
    import requests

    from ociproxy.config.settings import Timeouts

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_READ_LIMIT: Final = 1024 * 1024
"""Bytes that a read allocates. More cost more than the saved calls bring (measured, loopback)."""


class HttpBlobStream:
    """A `BlobStream` over the response of a GET."""

    def __init__(
        self, response: requests.Response, upstream: str, timeouts: Timeouts, *, start: int
    ) -> None:
        """The body must be the undecoded blob from `start` or 0 on. Else this closes the response
        and raises UpstreamUnavailable or UpstreamInvalid."""
        self._response = response
        self._upstream = upstream
        self._timeouts = timeouts
        self._read = 0
        self._aborted = False
        try:
            self.start, self.stop, self.size = self._extent(start)
        except UpstreamError:
            response.close()
            raise

    def read(self, limit: int) -> bytes:
        try:
            # `read` would wait for all of `limit`.
            data: bytes = self._response.raw.read1(min(limit, _READ_LIMIT), decode_content=False)
        except (*FOREIGN, ValueError, AttributeError) as exc:
            # `abort` from another thread makes ssl and http.client raise the last two.
            if self._aborted or not isinstance(exc, FOREIGN):
                raise UpstreamUnavailable(self._upstream, "read was aborted") from exc
            raise translate(exc, self._upstream, self._timeouts, body=True) from exc
        if self._aborted:
            # These bytes are not data: a TLS socket that was shut down gives encrypted bytes.
            raise UpstreamUnavailable(self._upstream, "read was aborted")
        self._read += len(data)
        if not data and self.stop is not None and self.start + self._read != self.stop:
            reason = f"connection closed at byte {self.start + self._read} of {self.stop}"
            raise UpstreamUnavailable(self._upstream, reason)
        return data

    def abort(self) -> None:
        self._aborted = True
        # These say that the body has ended or the response is closed: no read is to be woken.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.raw.shutdown()

    def close(self) -> None:
        self._response.close()

    def _extent(self, asked: int) -> tuple[int, int | None, int | None]:
        """Offsets in the blob where the body starts and stops, and the size of the blob, in bytes;
        None for what the upstream does not say. `asked` is the start of the requested range."""
        headers = self._response.headers
        encoding = headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise UpstreamInvalid(self._upstream, f"sends the blob encoded as {encoding!r}")
        length = content_length(self._response)
        if self._response.status_code != 206:
            return 0, length, length
        given = headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(given.strip())
        if match is None or int(match[1]) != asked:
            reason = f"answers a request for bytes {asked}- with the range {given[:80]!r}"
            raise UpstreamUnavailable(self._upstream, reason)
        return asked, int(match[2]) + 1, None if match[3] == "*" else int(match[3])
