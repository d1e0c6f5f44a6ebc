"""Volumes that are to be imported: which belong together, and whether a set is all there.

The first member of a volume says which one of which set it is; nothing else of a file is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.volume_writer import FORMAT, VOLUME_NAME
from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.errors import ConfigError, LayoutInvalid
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import json_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

LABEL_MAX_SIZE: Final = 4096
MAX_VOLUMES: Final = 10_000
_MOST_NAMED: Final = 20


@dataclass(frozen=True, slots=True)
class VolumeLabel:
    """Volume `number` (from 1) of `count` of a set."""

    set_id: str
    number: int
    count: int


def read_label(file: BinaryIO, source: str) -> VolumeLabel | None:
    """Of a file that is open at its beginning; None where it is no volume. Raises
    LayoutInvalid."""
    for member in members(ArchiveStream(file, source)):
        if member.name != VOLUME_NAME:
            return None
        return parse_label(member.read(LABEL_MAX_SIZE), source)
    return None


def parse_label(raw: bytes, source: str) -> VolumeLabel:
    """Raises LayoutInvalid."""
    try:
        document = json_object(raw)
    except MalformedManifest as exc:
        raise LayoutInvalid(source, f"{VOLUME_NAME} is {exc}") from exc
    set_id, number, count = (document.get(key) for key in ("set", "volume", "volumes"))
    if document.get("format") != FORMAT:
        raise LayoutInvalid(source, f'{VOLUME_NAME} does not say "format": "{FORMAT}"')
    if (
        not isinstance(set_id, str)
        or not isinstance(number, int)
        or not isinstance(count, int)
        or not 1 <= number <= count <= MAX_VOLUMES
    ):
        raise LayoutInvalid(source, f"{VOLUME_NAME} does not say which volume of how many this is")
    return VolumeLabel(set_id, number, count)


def grouped(labels: Mapping[Path, VolumeLabel | None]) -> list[list[Path]]:
    """The sources in their order, the volumes of a set together and by number.

    Raises ConfigError, naming what is missing, unless each set is complete.
    """
    groups: dict[Path | str, dict[int, Path]] = {}
    counts: dict[Path | str, int] = {}
    for path, label in labels.items():
        key = path if label is None else label.set_id
        group = groups.setdefault(key, {})
        number = 1 if label is None else label.number
        if number in group:
            raise ConfigError(f"is volume {number}, and so is {group[number]}", file=str(path))
        group[number] = path
        counts[key] = 1 if label is None else label.count
    for key, group in groups.items():
        missing = [number for number in range(1, counts[key] + 1) if number not in group]
        if missing:
            named = ", ".join(map(str, missing[:_MOST_NAMED]))
            more = ", ..." if len(missing) > _MOST_NAMED else ""
            raise ConfigError(
                f"is one of {counts[key]} volumes; give volume {named}{more} too, together with it",
                file=str(next(iter(group.values()))),
            )
    return [[path for _, path in sorted(group.items())] for group in groups.values()]
