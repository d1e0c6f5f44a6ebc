"""The members of a tar, one after the other, out of a stream that cannot go back.

`tarfile` reads each header, but not the archive: it believes sizes and keeps every member, and
what it cannot read it takes for the end. Here the end is only what says so, and whatever no tool
writes into an image archive is refused: devices, sparse files, names that lead elsewhere, two sizes
for one member. Links are handed on, never followed: nothing is unpacked under its name.

Formats: ustar, GNU (long names, sizes in base 256) and pax (POSIX.1-2001), of which only `path`,
`linkpath` and `size` mean anything here.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.errors import LayoutDamaged, LayoutInvalid, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.archive.importer.decompress import ArchiveStream

MAX_MEMBERS: Final = 300_000
"""Of one archive: some hundred bytes are remembered of each that is a document, or damaged."""
_MAX_EXTENSION: Final = 64 * 1024
"""Bytes of a long name or of a pax header."""
_MAX_EXTENSIONS: Final = 8
"""Headers that may come before the member they speak of."""
_OCTAL_MAX: Final = 8 * 1024**3 - 1
"""Bytes: the largest size that a plain header can state."""
_REGULAR: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_LINKS: Final = frozenset({tarfile.SYMTYPE, tarfile.LNKTYPE})
_EXTENSIONS: Final = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.XGLTYPE,
    }
)
_KINDS: Final = {
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_ZEROS: Final = bytes(tarfile.BLOCKSIZE)


@dataclass(slots=True)
class Member:
    """A file, or a link with the name it leads to. Read it before asking for the next one."""

    name: str
    size: int
    link: str
    _stream: ArchiveStream
    _left: int

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._stream.readinto(buffer[: self._left]) if self._left else 0
        self._left -= count
        return count

    def read(self, limit: int) -> bytes:
        """All of it. Raises LayoutInvalid where that is more than the limit, in bytes."""
        if self.size > limit:
            raise LayoutInvalid(self._stream.source, f"{self.name} is larger than {limit} bytes")
        raw = self._stream.read(self.size)
        self._left -= len(raw)
        return raw

    def leave(self) -> None:
        """Go past what was not read, and the padding."""
        if not self._stream.skip(self._left + -self.size % tarfile.BLOCKSIZE):
            raise LayoutDamaged(self._stream.source, f"is cut off inside {self.name}")
        self._left = 0


def members(stream: ArchiveStream) -> Iterator[Member]:
    """The files and links, in order.

    Raises LayoutInvalid for what is no tar or is refused; LayoutDamaged where it is cut off or
    broken from here on, so that what came before may still be good.
    """
    for _ in range(MAX_MEMBERS):
        member = _next(stream)
        if member is None:
            return
        if member.name:
            yield member
        member.leave()
    raise LayoutInvalid(stream.source, f"has more than {MAX_MEMBERS} members")


def _next(stream: ArchiveStream) -> Member | None:
    said: dict[str, str] = {}
    for _ in range(_MAX_EXTENSIONS):
        header = _header(stream)
        if header is None:
            if said:
                raise LayoutDamaged(stream.source, "ends after the header of a member")
            return None
        if header.type not in _EXTENSIONS:
            return _member(stream, header, said)
        raw = _extension(stream, header)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            said["path"] = _text(raw.split(b"\0", 1)[0])
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            said["linkpath"] = _text(raw.split(b"\0", 1)[0])
        elif header.type == tarfile.XGLTYPE:
            if not {"path", "linkpath", "size"}.isdisjoint(_records(stream, raw)):
                raise LayoutInvalid(stream.source, "has one name or size for all its members")
        else:
            said.update(_records(stream, raw))
    raise LayoutInvalid(stream.source, f"has more than {_MAX_EXTENSIONS} headers for one member")


def _header(stream: ArchiveStream) -> tarfile.TarInfo | None:
    """The next header; None at the end mark."""
    offset = stream.offset
    block = stream.read(tarfile.BLOCKSIZE)
    if block == _ZEROS:
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as exc:
        if offset == 0:
            raise LayoutInvalid(stream.source, "is neither a tar nor a folder") from exc
        if len(block) < tarfile.BLOCKSIZE:
            raise LayoutDamaged(stream.source, f"is cut off after {stream.offset} bytes") from exc
        raise LayoutDamaged(stream.source, f"is not a tar from byte {offset} on") from exc
    if header.size < 0:
        raise LayoutInvalid(stream.source, f"{shorten(header.name)} has a negative size")
    return header


def _extension(stream: ArchiveStream, header: tarfile.TarInfo) -> bytes:
    if header.size > _MAX_EXTENSION:
        raise LayoutInvalid(stream.source, f"has a header of {header.size} bytes")
    raw = stream.read(header.size)
    if len(raw) < header.size or not stream.skip(-header.size % tarfile.BLOCKSIZE):
        raise LayoutDamaged(stream.source, "is cut off inside a header")
    return raw


def _member(stream: ArchiveStream, header: tarfile.TarInfo, said: dict[str, str]) -> Member:
    name = said.get("path", header.name)
    if any(key.startswith("GNU.sparse") for key in said):
        header.type = tarfile.GNUTYPE_SPARSE
    if header.type == tarfile.DIRTYPE:
        _check_name(stream, name)
        return Member("", 0, "", stream, 0)
    if header.type not in _REGULAR | _LINKS:
        kind = _KINDS.get(header.type, f"of type {header.type!r}")
        raise LayoutInvalid(
            stream.source, f"{shorten(name)} is {kind}: nothing that belongs to an image archive"
        )
    clean = _check_name(stream, name)
    if header.type in _LINKS:
        target = said.get("linkpath", header.linkname)
        # A hard link's target counts from the root of the archive, a symbolic one's from itself.
        return Member(clean, 0, target if header.issym() else f"/{target}", stream, 0)
    size = _size(stream, header, said)
    return Member(clean, size, "", stream, size)


def _size(stream: ArchiveStream, header: tarfile.TarInfo, said: dict[str, str]) -> int:
    text = said.get("size")
    if text is None:
        return header.size
    size = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if size < 0 or (header.size not in (0, size) and size <= _OCTAL_MAX):
        raise LayoutInvalid(
            stream.source, f"{shorten(header.name)} has two sizes: {header.size} and {text[:20]}"
        )
    return size


def _check_name(stream: ArchiveStream, name: str) -> str:
    """The name without a leading `./`; refused where it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise LayoutInvalid(
            stream.source, f"member {shorten(name)} leads out of the archive: refused"
        )
    return "/".join(parts)


def _records(stream: ArchiveStream, raw: bytes) -> dict[str, str]:
    """`<length> <key>=<value>` and a newline, over and over."""
    records: dict[str, str] = {}
    while raw:
        digits, _, _ = raw.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 7 else 0
        record = raw[len(digits) + 1 : length]
        key, separator, value = record[:-1].partition(b"=")
        if not separator or length > len(raw) or record[-1:] != b"\n":
            raise LayoutInvalid(stream.source, "has a pax header that is none")
        records[_text(key)] = _text(value)
        raw = raw[length:]
    return records


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
