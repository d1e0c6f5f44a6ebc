"""The volumes of an archive: what each says of itself, what its file is called, and whether a set
is complete.

Each volume is a tar of its own with whole members. Its first member, the label, says which volume
of which set it is. Its last member has the size and the sha256 of the bytes before it, of every
volume of the set, so that an operator can tell from any volume whether the others are right; the
import verifies each blob by its digest and does not read that member.

Tests: tests/archive/export/test_export.py, tests/archive/test_import_export.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.lock import LOCK_MAX_SIZE, LOCK_NAME
from ociproxy.errors import ConfigError, LayoutInvalid
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.layout import INDEX, INDEX_MAX_SIZE, MARKER
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, json_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

LABEL_NAME: Final = "ociproxy-volume.json"
FORMAT: Final = "ociproxy-volume/1"
LABEL_MAX_SIZE: Final = 4096
"""Bytes: ample for the four short fields of a label."""
DOCUMENTS: Final = {
    MARKER: MANIFEST_MAX_SIZE,
    INDEX: INDEX_MAX_SIZE,
    LOCK_NAME: LOCK_MAX_SIZE,
    LABEL_NAME: LABEL_MAX_SIZE,
}
"""The members that say what an archive or a volume of one holds, and how many bytes each may
have."""

_MAX_VOLUMES: Final = 10_000
"""Volumes of a set that are read: it bounds the work that a hostile label can ask for."""
_MOST_NAMED: Final = 20
"""Missing volumes that one message names: a person reads it."""
_NUMBERED: Final = re.compile(r"\.\d+of\d+$")


@dataclass(frozen=True, slots=True)
class VolumeLabel:
    """Volume `number` (from 1) of `count` of a set."""

    set_id: str
    number: int
    count: int

    def encode(self) -> bytes:
        return encode_json(
            {"format": FORMAT, "set": self.set_id, "volume": self.number, "volumes": self.count}
        )

    @staticmethod
    def parse(raw: bytes, source: str) -> VolumeLabel:
        """Raises LayoutInvalid, naming the source."""
        try:
            document = json_object(raw)
        except MalformedManifest as exc:
            raise LayoutInvalid(source, f"{LABEL_NAME} is {exc}") from exc
        set_id, number, count = (document.get(key) for key in ("set", "volume", "volumes"))
        if document.get("format") != FORMAT:
            raise LayoutInvalid(source, f'{LABEL_NAME} does not say "format": "{FORMAT}"')
        if (
            not isinstance(set_id, str)
            or not isinstance(number, int)
            or not isinstance(count, int)
            or not 1 <= number <= count <= _MAX_VOLUMES
        ):
            raise LayoutInvalid(
                source, f"{LABEL_NAME} does not say which volume of how many this is"
            )
        return VolumeLabel(set_id, number, count)


def encode_json(document: dict[str, object]) -> bytes:
    """One line with its keys in order, so that equal volumes are equal bytes."""
    return json.dumps(document, sort_keys=True).encode() + b"\n"


def read_label(file: BinaryIO, source: str) -> VolumeLabel | None:
    """The label of a file that is open at its beginning; None where it is no volume. Reads no more
    than the first member. Raises LayoutInvalid."""
    for member in members(ArchiveStream(file, source)):
        if member.name != LABEL_NAME:
            return None
        return VolumeLabel.parse(member.read(LABEL_MAX_SIZE), source)
    return None


def grouped(labels: Mapping[Path, VolumeLabel | None]) -> list[list[Path]]:
    """The paths in their order, with the volumes of a set together and by number.

    Raises ConfigError unless each set is complete, naming the missing volumes, or the volume of
    another set that was given in the place of one.
    """
    groups: dict[Path | str, dict[int, Path]] = {}
    counts: dict[Path | str, int] = {}
    for path, label in labels.items():
        key, number, count = (
            (path, 1, 1) if label is None else (label.set_id, label.number, label.count)
        )
        group = groups.setdefault(key, {})
        if number in group:
            raise ConfigError(f"is volume {number}, and so is {group[number]}", file=str(path))
        group[number] = path
        counts[key] = count
    for key, group in groups.items():
        missing = [number for number in range(1, counts[key] + 1) if number not in group]
        # Of a set of as many volumes, which fills these places: a volume of another export.
        for number, stray in _strays(groups, counts, key, missing):
            first = next(iter(group.values()))
            raise ConfigError(f"is volume {number} of another set than {first}", file=str(stray))
        if missing:
            named = ", ".join(map(str, missing[:_MOST_NAMED]))
            more = ", ..." if len(missing) > _MOST_NAMED else ""
            raise ConfigError(
                f"is one of {counts[key]} volumes; give volume {named}{more} too, together with it",
                file=str(next(iter(group.values()))),
            )
    return [[path for _, path in sorted(group.items())] for group in groups.values()]


def _strays(
    groups: Mapping[Path | str, Mapping[int, Path]],
    counts: Mapping[Path | str, int],
    key: Path | str,
    missing: Sequence[int],
) -> Iterator[tuple[int, Path]]:
    """Volumes of sets that are not larger than this one and have what it misses."""
    for other, group in groups.items():
        if other != key and counts[other] == counts[key] and len(group) <= len(groups[key]):
            yield from ((number, group[number]) for number in missing if number in group)


def volume_paths(path: Path, count: int) -> list[Path]:
    """`cache.tar` -> `cache.01of12.tar`, `cache.02of12.tar` and so on."""
    stem, suffix = _split_name(path.name)
    digits = len(str(count))
    return [
        path.with_name(f"{stem}.{number:0{digits}d}of{count}{suffix}")
        for number in range(1, count + 1)
    ]


def stale_volumes(path: Path, keep: Sequence[Path]) -> list[Path]:
    """Volumes that an earlier export left under this name: with `cache.*.tar` an operator would
    import volumes of two sets."""
    stem, suffix = _split_name(path.name)
    return sorted(
        each
        for each in path.parent.iterdir()
        if each not in keep
        and each.name.startswith(f"{stem}.")
        and each.name.endswith(suffix)
        and _NUMBERED.fullmatch(each.name.removeprefix(stem).removesuffix(suffix))
    )


def _split_name(name: str) -> tuple[str, str]:
    for suffix in (".tar.zst", ".tar"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
