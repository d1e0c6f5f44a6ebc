"""What the steps of an import hand on: what a source held, and what became of each image.

Tests: tests/archive/importer/test_importer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ociproxy.oci.descriptor import OCI_MANIFEST, Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import NamedImage

if TYPE_CHECKING:
    from ociproxy.archive.lock import Lock


@dataclass(slots=True)
class Received:
    """What one source held. `damage` is empty, or says why the end of the source did not come;
    `notes` are for the operator."""

    source: str
    images: list[NamedImage] = field(default_factory=list)
    lock: Lock | None = None
    damage: str = ""
    notes: list[str] = field(default_factory=list)


def unreadable(problem: str) -> NamedImage:
    """An image whose source does not say which manifest it has: its digest is a placeholder."""
    return NamedImage(Descriptor(OCI_MANIFEST, Digest.of(b""), 0), None, problem=problem)


class OnExisting(StrEnum):
    """What to do with a tag that the store has with another digest."""

    KEEP = "keep"
    REPLACE = "replace"
    ERROR = "error"


class Status(StrEnum):
    IMPORTED = "imported"
    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    KEPT = "kept"
    HELD_BACK = "held back"
    EXISTS = "exists"
    UNNAMED = "unnamed"
    INCOMPLETE = "incomplete"
    NO_ROOM = "no room"


PUBLISHED: Final = (Status.IMPORTED, Status.REPLACED, Status.UNCHANGED)
EXIT_CODES: Final = {
    Status.INCOMPLETE: 5,
    Status.NO_ROOM: 4,
    Status.EXISTS: 3,
    Status.HELD_BACK: 3,
    Status.UNNAMED: 2,
}
"""Exit codes of images that are not published; of several, the first in this order counts."""


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What became of one image. `previous` is the digest that its tag had in the store, `left_out`
    names what the source did not carry: platforms of an index, non-distributable layers."""

    source: str
    name: str
    digest: Digest
    status: Status
    previous: Digest | None = None
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
