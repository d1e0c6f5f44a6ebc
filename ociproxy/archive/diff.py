"""What moved between two locks, and which contents the second has and the first lacks.

No blob is read: of an archive only its lock, of a store only its records and manifests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.archive.export.content import contents, lock_of
from ociproxy.archive.export.selection import Selected, reach
from ociproxy.archive.lock import read_lock
from ociproxy.store.files import store_errors
from ociproxy.store.inventory import is_only_named, references
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.archive.lock import Lock, LockedImage
    from ociproxy.oci.digest import Digest


@dataclass(frozen=True, slots=True)
class Difference:
    """From a first lock to a second. `moved` are references with another digest, `changed` those
    with the same digest and other platforms, or complete in one lock only. `carry` has the sizes in
    bytes of contents that only the second lock has, `dropped` of those that only the first has."""

    added: tuple[LockedImage, ...]
    removed: tuple[LockedImage, ...]
    moved: tuple[tuple[LockedImage, LockedImage], ...]
    changed: tuple[tuple[LockedImage, LockedImage], ...]
    carry: dict[Digest, int]
    dropped: dict[Digest, int]

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.moved, self.changed, self.carry, self.dropped))


def diff(first: Lock, second: Lock) -> Difference:
    """All parts are in the order of references and digests."""
    old = {str(each.reference): each for each in first.images}
    new = {str(each.reference): each for each in second.images}
    both = [(old[name], new[name]) for name in sorted(old.keys() & new.keys())]
    same = [pair for pair in both if pair[0].descriptor.digest == pair[1].descriptor.digest]
    return Difference(
        added=tuple(new[name] for name in sorted(new.keys() - old.keys())),
        removed=tuple(old[name] for name in sorted(old.keys() - new.keys())),
        moved=tuple(pair for pair in both if pair not in same),
        changed=tuple(
            pair
            for pair in same
            if set(pair[0].platforms) != set(pair[1].platforms)
            or pair[0].complete != pair[1].complete
        ),
        carry=_lacking(first, second),
        dropped=_lacking(second, first),
    )


def open_lock(path: Path) -> Lock:
    """The lock of a store where the path is a folder, else of a lock file or an archive.

    The lock of a store is made of all that is cached, incomplete images included. Raises
    StoreError, LockInvalid or LayoutInvalid.
    """
    with store_errors(path):
        folder = path.is_dir()
    if not folder:
        return read_lock(path)
    store = open_existing(path)
    selected = (
        Selected(reference, top)
        for reference, top, _ in references(store)
        if not is_only_named(store, reference.repository, top)
    )
    chosen = reach(store, selected, referrers=True, allow_partial=True)
    return lock_of(chosen, contents(chosen))


def _lacking(first: Lock, second: Lock) -> dict[Digest, int]:
    lacking = ((d, size) for d, size in second.contents.items() if d not in first.contents)
    return dict(sorted(lacking, key=lambda pair: str(pair[0])))
