"""Which members go into which volume of an archive, where `--volume-size` splits it.

The first volume has the documents and, before the blobs, all manifests. `ociproxy.archive.volumes`
says what the two members are that each volume begins and ends with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import Content, Document
from ociproxy.archive.export.tar_writer import END_SIZE, member_size
from ociproxy.archive.volumes import FORMAT, LABEL_NAME, VolumeLabel, encode_json
from ociproxy.errors import ConfigError, VolumeTooSmall

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.oci.digest import Digest

PARTS_NAME: Final = "ociproxy-parts.json"

_MAX_VOLUMES: Final = 500
"""The export has all volumes open until the last one is written; many systems allow a process 1024
open files."""


@dataclass(frozen=True, slots=True)
class Part:
    """The members of one file, documents first."""

    documents: tuple[Document, ...]
    contents: tuple[Content, ...]

    @property
    def size(self) -> int:
        """Bytes that the members take in a tar, headers and padding included."""
        named = [(each.name, len(each.data)) for each in self.documents]
        named += [(each.name, each.size) for each in self.contents]
        return sum(member_size(name, size) for name, size in named)


@dataclass(frozen=True, slots=True)
class Body:
    """Size in bytes and sha256 of everything in a volume before its last member."""

    size: int
    digest: Digest


def split(
    documents: Sequence[Document], contents: Sequence[Content], limit: int, *, set_id: Digest
) -> list[Part]:
    """Volumes of at most `limit` bytes, filled in the order of the archive.

    Raises VolumeTooSmall with a size that is enough, or ConfigError for more than 500 volumes.
    """
    count, least = 1, limit
    largest, subject = _largest(documents, contents)
    while True:
        overhead = _overhead(least, set_id, count)
        if overhead + largest > least:
            # Tried again: the overhead grows with the digits of the size.
            least = overhead + largest
            continue
        parts = list(_fill(documents, contents, least - overhead, _label(set_id, count, count)))
        if len(parts) > _MAX_VOLUMES and least > limit:
            least, count = 2 * least, 1
            continue
        if len(parts) > _MAX_VOLUMES:
            raise ConfigError(
                f"makes {len(parts)} volumes, more than {_MAX_VOLUMES}: give a larger size",
                key="--volume-size",
            )
        if len(parts) <= count:
            if least > limit:
                raise VolumeTooSmall(subject, limit, least)
            return [
                Part((_label(set_id, number, len(parts)), *part.documents[1:]), part.contents)
                for number, part in enumerate(parts, 1)
            ]
        # Tried again: the last member of each volume grows with the number of volumes.
        count = len(parts)


def parts_document(set_id: Digest, bodies: Sequence[Body]) -> Document:
    """The last member of every volume; it has the bodies of all volumes in order."""
    parts = [{"size": body.size, "sha256": body.digest.encoded} for body in bodies]
    raw = encode_json({"format": FORMAT, "set": str(set_id), "parts": parts})
    return Document(PARTS_NAME, raw)


def _largest(documents: Sequence[Document], contents: Sequence[Content]) -> tuple[int, str]:
    """Bytes of the largest thing that must stand in one volume, and its name for a message."""
    largest, subject = Part(tuple(documents), ()).size, "the list of images and the lock"
    for content in contents:
        size = member_size(content.name, content.size)
        if size > largest:
            largest, subject = size, f"blob {content.digest}"
    return largest, subject


def _overhead(limit: int, set_id: Digest, count: int) -> int:
    """Bytes that a volume of a set of `count` needs for its label, last member and end mark."""
    parts = parts_document(set_id, [Body(limit, set_id)] * count)
    return Part((_label(set_id, count, count), parts), ()).size + END_SIZE


def _fill(
    documents: Sequence[Document], contents: Sequence[Content], space: int, label: Document
) -> Iterator[Part]:
    """`space` is in bytes, and at least the size of the largest member."""
    held: list[Content] = []
    current = (label, *documents)
    room = space - Part(tuple(documents), ()).size
    for content in contents:
        size = member_size(content.name, content.size)
        if size > room:
            yield Part(current, tuple(held))
            current, held, room = (label,), [], space
        held.append(content)
        room -= size
    yield Part(current, tuple(held))


def _label(set_id: Digest, number: int, count: int) -> Document:
    return Document(LABEL_NAME, VolumeLabel(str(set_id), number, count).encode())
