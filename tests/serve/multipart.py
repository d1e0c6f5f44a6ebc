"""multipart/byteranges as a client reads it (RFC 9110, section 14.6)."""

from __future__ import annotations

import re

from tests.server import Answer

_PART = re.compile(
    rb"Content-Type: application/octet-stream\r\n"
    rb"Content-Range: bytes (\d+)-(\d+)/\d+\r\n\r\n(.*)",
    re.DOTALL,
)


def parts_of(answer: Answer) -> list[tuple[int, int, bytes]]:
    """Of each part the first byte, the last byte and the bytes; checks that all agrees."""
    assert answer.status == 206
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert "content-range" not in answer.headers
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    first, *parts, last = answer.body.split(b"\r\n--" + boundary.encode())
    assert (first, last) == (b"", b"--\r\n")
    found = []
    for part in parts:
        matched = _PART.fullmatch(part.removeprefix(b"\r\n"))
        assert matched is not None, part[:200]
        start, stop = int(matched[1]), int(matched[2])
        assert stop - start + 1 == len(matched[3])
        found.append((start, stop, matched[3]))
    return found
