"""Publishing what a source held: which images are whole, their names, and the tags they move.

Nothing is published of a delta whose base is not in the store, nor, with `--on-existing error`, of
a source that would move a tag.

Tests: tests/archive/importer/test_importer.py, tests/archive/test_import_export.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ociproxy.archive.entries import sort_entries
from ociproxy.archive.importer.naming import GivenName, name_all
from ociproxy.archive.importer.results import ImportResult, OnExisting, Status
from ociproxy.archive.lock import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.archive.importer.results import Received
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.layout import NamedImage
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.examined import Examined
    from ociproxy.store.extract import Extractor
    from ociproxy.store.store import Store

_BATCH: Final = 64
"""Images that are flushed to the disk together: the operator hears of the first images early."""
_MOST_PROBLEMS: Final = 100
"""Problems of one image that are told one by one: a delta without its base can have thousands."""


class Publisher:
    """Publishes what one source held, and tells the result of each image as soon as it is known."""

    def __init__(
        self,
        store: Store,
        received: Received,
        extractor: Extractor,
        *,
        on_existing: OnExisting,
        tell: Callable[[ImportResult], None],
    ) -> None:
        self._store = store
        self._received = received
        self._source = received.source
        self._extractor = extractor
        self._on_existing = on_existing
        self._tell = tell
        self._lock = received.lock or Lock(())
        self._gaps = {digest for image in self._lock.images for digest in image.missing}
        self._incomplete = {each.reference for each in self._lock.images if not each.complete}
        self._repositories: dict[Digest, set[Repository]] | None = None
        """The repositories of each published manifest; None where no referrer has to find them."""

    def publish(self, given: GivenName | None) -> None:
        """Raises StoreError."""
        base = self._missing_base()
        if base:
            needed = "the base of this delta is not in the store: import the base first"
            for image in self._received.images:
                self._refuse(image, Status.INCOMPLETE, [needed, *base])
                base = []
            return
        entries = sort_entries(self._received.images, self._extractor.find_manifest)
        for image in entries.refused:
            self._refuse(image, Status.INCOMPLETE, [image.problem])
        named, nameless = name_all(entries, given)
        for image, reason in nameless:
            self._refuse(image, Status.INCOMPLETE if image.reference else Status.UNNAMED, [reason])
        if self._on_existing is OnExisting.ERROR and self._tell_existing(named):
            return
        if entries.referrers:
            self._repositories = {}
        for first in range(0, len(named), _BATCH):
            self._publish_batch(named[first : first + _BATCH])
        self._publish_referrers(entries.referrers)

    def _missing_base(self) -> list[str]:
        """The blobs that a delta leaves out and the store does not have."""
        return [
            f"{digest}: of the base"
            for digest in sorted(self._lock.omitted, key=str)
            if not self._extractor.holds(digest)
        ]

    def _tell_existing(self, named: list[tuple[NamedImage, Reference]]) -> bool:
        """Whether an image would move a tag; if so, no image is to be published, and all are told
        so."""
        found = [(image, reference, self._previous(reference)) for image, reference in named]
        if all(previous in (None, image.descriptor.digest) for image, _, previous in found):
            return False
        for image, reference, previous in found:
            digest = image.descriptor.digest
            status = Status.HELD_BACK if previous in (None, digest) else Status.EXISTS
            self._tell(ImportResult(self._source, str(reference), digest, status, previous))
        return True

    def _publish_batch(self, named: list[tuple[NamedImage, Reference]]) -> None:
        whole: list[tuple[Reference, Examined, ImportResult]] = []
        for image, reference in named:
            examined = self._examine(image, reference.repository)
            problems = [*map(str, examined.problems), *self._broken_lock(reference, examined)]
            if problems:
                no_room = any(each.no_room for each in examined.problems)
                self._refuse(image, Status.NO_ROOM if no_room else Status.INCOMPLETE, problems)
                continue
            digest, previous = image.descriptor.digest, self._previous(reference)
            result = ImportResult(self._source, str(reference), digest, Status.IMPORTED, previous)
            if previous == digest:
                result = replace(result, status=Status.UNCHANGED)
            elif previous is not None and self._on_existing is OnExisting.KEEP:
                self._tell(replace(result, status=Status.KEPT))
                continue
            elif previous is not None:
                result = replace(result, status=Status.REPLACED)
            self._extractor.prepare(examined)
            left_out = tuple(map(_shown, examined.left_out))
            whole.append((reference, examined, replace(result, left_out=left_out)))
        self._extractor.drain()
        revealed = [
            self._extractor.reveal(reference.repository, examined, reference.tag)
            for reference, examined, _ in whole
        ]
        for (reference, examined, result), (gone, commit) in zip(whole, revealed, strict=True):
            commit.wait()
            if gone:
                told = tuple(map(str, gone[:_MOST_PROBLEMS]))
                self._tell(replace(result, status=Status.INCOMPLETE, problems=told))
                continue
            self._remember(examined, reference.repository)
            self._tell(result)

    def _publish_referrers(self, waiting: list[tuple[NamedImage, Digest]]) -> None:
        """A referrer goes to all repositories that have its subject, which may be another
        referrer."""
        while waiting and self._repositories is not None:
            later: list[tuple[NamedImage, Digest]] = []
            for image, subject in waiting:
                repositories = self._repositories.get(subject)
                if not repositories:
                    later.append((image, subject))
                    continue
                refused: list[str] = []
                for repository in sorted(repositories, key=str):
                    examined = self._examine(image, repository)
                    problems = examined.problems or self._extractor.publish(repository, examined)
                    if problems:
                        refused = refused or [*map(str, problems)]
                    else:
                        self._remember(examined, repository)
                if refused:
                    self._refuse(image, Status.INCOMPLETE, refused)
            if len(later) == len(waiting):
                return  # Their subjects are not published, so no client can ask for them.
            waiting = later

    def _examine(self, image: NamedImage, repository: Repository) -> Examined:
        # A lock says which children of an index have to be here. Without a lock, a cut archive may
        # have lost children, so none may be absent.
        sparse = self._received.lock is not None or not self._received.damage
        return self._extractor.examine(image.descriptor, repository, sparse=sparse)

    def _broken_lock(self, reference: Reference, examined: Examined) -> list[str]:
        """What the lock in the archive says of the image and is not so."""
        problems = [
            f"{child.digest}: listed in the lock, but not in the archive"
            for child in examined.left_out
            if child.digest in self._lock.contents and child.digest not in self._gaps
        ]
        if reference in self._incomplete:
            problems.append("was incomplete when it was exported, with --allow-partial")
        return problems

    def _previous(self, reference: Reference) -> Digest | None:
        """The digest that the tag has in the store."""
        if reference.tag is None:
            return None
        record = self._store.refs.find_tag(reference.repository, reference.tag)
        return record.descriptor.digest if record else None

    def _remember(self, examined: Examined, repository: Repository) -> None:
        if self._repositories is not None:
            for digest in examined.manifests:
                self._repositories.setdefault(digest, set()).add(repository)

    def _refuse(self, image: NamedImage, status: Status, problems: list[str]) -> None:
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > _MOST_PROBLEMS:
            shown.append(f"and {len(problems) - _MOST_PROBLEMS} more")
        digest, told = image.descriptor.digest, tuple(shown)
        self._tell(ImportResult(self._source, str(image), digest, status, problems=told))


def _shown(left_out: Descriptor) -> str:
    if left_out.is_nondistributable:
        return f"the non-distributable layer {left_out.digest}"
    return str(left_out.platform or left_out.digest)
