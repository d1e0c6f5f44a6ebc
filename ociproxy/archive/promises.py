"""What the lock in an archive says has to be there, against what is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ociproxy.archive.lock import Lock
    from ociproxy.oci.reference import Reference
    from ociproxy.store.examined import Examined
    from ociproxy.store.extract import Extractor


class Promises:
    """None are made, and so none broken, where there is no lock."""

    def __init__(self, lock: Lock | None) -> None:
        self._contents = lock.contents if lock else {}
        self._base = lock.omitted if lock else frozenset()
        images = lock.images if lock else ()
        self._gaps = {digest for image in images for digest in image.missing}
        self._incomplete = {image.reference for image in images if not image.complete}

    def absent_base(self, extractor: Extractor) -> list[str]:
        """What a delta builds on and the store does not have."""
        return [
            f"{digest}: of the base of this delta, and not in the store; import the base first"
            for digest in sorted(self._base, key=str)
            if not extractor.holds(digest)
        ]

    def broken(self, reference: Reference, examined: Examined) -> list[str]:
        """Why an image that could stand for itself is not what was exported."""
        problems = [
            f"manifest {child.digest}: listed, but not in the archive"
            for child in examined.left_out
            if child.digest in self._contents and child.digest not in self._gaps
        ]
        if reference in self._incomplete:
            problems.append("was incomplete when it was exported, with --allow-partial")
        return problems
