"""The members of a tar, one after the other, from a stream that cannot go back.

`tarfile` parses each header, but does not walk the archive: it would believe any size, keep all
members in memory, and take a broken header for the end. Here only the end mark is the end. What no
tool writes into an image archive is refused: devices, sparse files, names that lead out of it, two
sizes for one member. No member is unpacked under its name, and no link is followed here.

Formats: ustar, GNU (long names, sizes in base 256) and pax (POSIX.1-2001), of whose records only
`path`, `linkpath` and `size` are used.
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
"""Members of one archive: an import keeps some hundred bytes in memory of each document and of each
damaged blob, a bundle of each blob."""
_MAX_EXTENSION: Final = 64 * 1024
"""Bytes of a long name or of a pax header; file systems take names of at most 4 KiB."""
_MAX_EXTENSIONS: Final = 8
"""Headers before one member; GNU and pax write one or two."""
_OCTAL_MAX: Final = 8 * 1024**3 - 1
"""Bytes: the largest size that the octal field of a header can state."""
_REGULAR: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_LINKS: Final = frozenset({tarfile.SYMTYPE, tarfile.LNKTYPE})
_LONG: Final = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
"""GNU headers whose data is a name; the pax record that says the same."""
_PAX: Final = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE})
_KINDS: Final = {
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_ZEROS: Final = bytes(tarfile.BLOCKSIZE)


@dataclass(slots=True)
class Member:
    """A file, or a link with its target in `link`. Read it before you ask for the next member."""

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
        """The whole member, or less where the stream ends. Raises LayoutInvalid for a member of
        more than `limit` bytes."""
        if self.size > limit:
            raise LayoutInvalid(self._stream.source, f"{self.name} is larger than {limit} bytes")
        raw = self._stream.read(self.size)
        self._left -= len(raw)
        return raw

    def leave(self) -> None:
        """Skip the rest and the padding. Raises LayoutDamaged where the stream ends before."""
        if not self._stream.skip(self._left + -self.size % tarfile.BLOCKSIZE):
            raise LayoutDamaged(self._stream.source, f"is cut off inside {self.name}")
        self._left = 0


def members(stream: ArchiveStream) -> Iterator[Member]:
    """The files and links in order; folders are left out.

    Raises LayoutInvalid for a stream that is no tar or is refused. Raises LayoutDamaged where it is
    cut off or broken; the members before may still be good.
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
    stated: dict[str, str] = {}
    for _ in range(_MAX_EXTENSIONS):
        header = _header(stream)
        if header is None:
            if stated:
                raise LayoutDamaged(stream.source, "ends after the header of a member")
            return None
        if header.type not in _PAX and header.type not in _LONG:
            return _member(stream, header, stated)
        raw = _extension(stream, header)
        if header.type in _LONG:
            stated[_LONG[header.type]] = _text(raw.split(b"\0", 1)[0])
        elif header.type == tarfile.XGLTYPE:
            if not {"path", "linkpath", "size"}.isdisjoint(_records(stream, raw)):
                raise LayoutInvalid(stream.source, "has one name or size for all its members")
        else:
            stated.update(_records(stream, raw))
    raise LayoutInvalid(stream.source, f"has more than {_MAX_EXTENSIONS} headers for one member")


def _header(stream: ArchiveStream) -> tarfile.TarInfo | None:
    """The next header, or None at the end mark."""
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
    """The data of a header that describes the member after it."""
    if header.size > _MAX_EXTENSION:
        raise LayoutInvalid(stream.source, f"has a header of {header.size} bytes")
    raw = stream.read(header.size)
    if len(raw) < header.size or not stream.skip(-header.size % tarfile.BLOCKSIZE):
        raise LayoutDamaged(stream.source, "is cut off inside a header")
    return raw


def _member(stream: ArchiveStream, header: tarfile.TarInfo, stated: dict[str, str]) -> Member:
    name = stated.get("path", header.name)
    if any(key.startswith("GNU.sparse") for key in stated):
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
        target = stated.get("linkpath", header.linkname)
        # The target of a hard link is a name in the archive; that of a symbolic link is relative.
        return Member(clean, 0, target if header.issym() else f"/{target}", stream, 0)
    size = _size(stream, header, stated)
    return Member(clean, size, "", stream, size)


def _size(stream: ArchiveStream, header: tarfile.TarInfo, stated: dict[str, str]) -> int:
    text = stated.get("size")
    if text is None:
        return header.size
    size = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if size < 0 or (header.size not in (0, size) and size <= _OCTAL_MAX):
        raise LayoutInvalid(
            stream.source, f"{shorten(header.name)} has two sizes: {header.size} and {text[:20]}"
        )
    return size


def _check_name(stream: ArchiveStream, name: str) -> str:
    """The name without a leading `./`. Raises LayoutInvalid where it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise LayoutInvalid(
            stream.source, f"member {shorten(name)} leads out of the archive: refused"
        )
    return "/".join(parts)


def _records(stream: ArchiveStream, raw: bytes) -> dict[str, str]:
    """The records of a pax header, each `<length> <key>=<value>` and a newline."""
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
