"""Splitting an archive for media that are smaller than it: whole members in every volume, each of
which is a tar of its own.

The first member of a volume says which one of which set it is. The last says the length and the
sha256 of what stands before it in every volume of the set, so that any volume tells whether the
others are right. The first volume has the documents and, before the blobs, all manifests.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import Content, Document
from ociproxy.archive.export.tar_writer import END_SIZE, member_size
from ociproxy.errors import ConfigError, VolumeTooSmall
from ociproxy.oci.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

VOLUME_NAME: Final = "ociproxy-volume.json"
PARTS_NAME: Final = "ociproxy-parts.json"
FORMAT: Final = "ociproxy-volume/1"

_MAX_VOLUMES: Final = 500
"""All are open until the last one is written."""
_NUMBERED: Final = re.compile(r"\.\d+of\d+$")


@dataclass(frozen=True, slots=True)
class Part:
    """What one file holds."""

    documents: tuple[Document, ...]
    contents: tuple[Content, ...]

    @property
    def size(self) -> int:
        """Bytes of its members in a tar."""
        named = [(each.name, len(each.data)) for each in self.documents]
        named += [(each.name, each.size) for each in self.contents]
        return sum(member_size(name, size) for name, size in named)


@dataclass(frozen=True, slots=True)
class Body:
    """What stands in a volume before its last member."""

    size: int
    digest: Digest


def split(
    documents: Sequence[Document], contents: Sequence[Content], limit: int, *, set_id: Digest
) -> list[Part]:
    """Volumes of at most `limit` bytes, filled in the order of the archive.

    Raises VolumeTooSmall with a size that is enough, ConfigError where they would be too many.
    """
    count, least = 1, limit
    largest, subject = _largest(documents, contents)
    while True:
        around = _around(least, set_id, count)
        if around + largest > least:
            least = around + largest
            continue  # a longer number may take more room itself
        parts = list(_split(documents, contents, least - around, _volume(set_id, count, count)))
        if len(parts) > _MAX_VOLUMES and least > limit:
            least, count = 2 * least, 1
            continue
        if len(parts) > _MAX_VOLUMES:
            raise ConfigError(
                f"makes {len(parts)} volumes, more than {_MAX_VOLUMES}: give a larger size",
                key="--volume-size",
            )
        # The members that describe the set grow with the number of volumes.
        if len(parts) <= count:
            if least > limit:
                raise VolumeTooSmall(subject, limit, least)
            return [
                Part((_volume(set_id, position, len(parts)), *part.documents[1:]), part.contents)
                for position, part in enumerate(parts, 1)
            ]
        count = len(parts)


def parts_document(set_id: Digest, bodies: Sequence[Body]) -> Document:
    """The last member of every volume."""
    described = [{"size": body.size, "sha256": body.digest.encoded} for body in bodies]
    return _document(PARTS_NAME, {"format": FORMAT, "set": str(set_id), "parts": described})


def volume_path(path: Path, number: int, count: int) -> Path:
    """`cache.tar` -> `cache.03of12.tar`."""
    stem, suffix = _split_name(path.name)
    return path.with_name(f"{stem}.{number:0{len(str(count))}d}of{count}{suffix}")


def other_volumes(path: Path, keep: Sequence[Path]) -> list[Path]:
    """Volumes that an earlier export left under this name, and that are in nobody's way but a
    reader's."""
    stem, suffix = _split_name(path.name)
    found = []
    for each in path.parent.iterdir():
        if each.name.startswith(f"{stem}.") and each.name.endswith(suffix) and each not in keep:
            middle = each.name.removeprefix(stem).removesuffix(suffix)
            if _NUMBERED.fullmatch(middle):
                found.append(each)
    return sorted(found)


def _largest(documents: Sequence[Document], contents: Sequence[Content]) -> tuple[int, str]:
    """Bytes of what is never split, and what it is."""
    largest, subject = Part(tuple(documents), ()).size, "the list of images and the lock"
    for content in contents:
        size = member_size(content.name, content.size)
        if size > largest:
            largest, subject = size, f"blob {content.digest}"
    return largest, subject


def _around(limit: int, set_id: Digest, count: int) -> int:
    """Bytes of what describes the set in each of so many volumes."""
    parts = parts_document(set_id, [Body(limit, set_id)] * count)
    return Part((_volume(set_id, count, count), parts), ()).size + END_SIZE


def _split(
    documents: Sequence[Document], contents: Sequence[Content], space: int, label: Document
) -> Iterator[Part]:
    """`space` are the bytes that a volume has for members: at least those of the largest."""
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


def _volume(set_id: Digest, number: int, count: int) -> Document:
    return _document(
        VOLUME_NAME, {"format": FORMAT, "set": str(set_id), "volume": number, "volumes": count}
    )


def _document(name: str, value: object) -> Document:
    return Document(name, json.dumps(value, sort_keys=True).encode() + b"\n")


def _split_name(name: str) -> tuple[str, str]:
    for suffix in (".tar.zst", ".tar"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
