"""Carrying out a plan: refs first, then manifests, then blobs, in batches that are short.

Before a file goes, its last use is looked at again, and whether a manifest needs it that came
since: docs/internals.md says why that is enough. Killed at any moment, it leaves content that no
ref names, never a tag or a repository's record whose manifest is gone.
Tests: tests/cli/test_prune_command.py, tests/store/test_removal.py.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy.errors import StoreError
from ociproxy.store.files import fsync_directory, store_errors
from ociproxy.store.pruning.plan import Removed
from ociproxy.store.pruning.removed import BY_OPERATOR, RemovedImage, add_removed
from ociproxy.store.records import RecordFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ociproxy.oci.reference import Repository
    from ociproxy.store.pruning.plan import Plan
    from ociproxy.store.pruning.survey import StoredFile, Survey, SurveyedImage
    from ociproxy.store.removal import Remover
    from ociproxy.store.store import Store

T = TypeVar("T")

_BATCH: Final = 0.25
"""Seconds for which publishers wait, and the answers to clients with them."""


@dataclass(slots=True)
class Pruned(Removed):
    """`kept` are images that were used or published again since the plan."""

    kept: list[SurveyedImage] = field(default_factory=list)


def carry_out(
    store: Store, survey: Survey, plan: Plan, remover: Remover, *, keep_recent: float
) -> Pruned:
    """Raises Busy or StoreError; what went until then is gone."""
    work = _Work(store, survey, plan, remover)
    try:
        work.remove_images()
        work.remove_records()
        work.remove_manifests()
        work.remove_blobs()
        work.remove_empty_folders()
        work.remove_rubbish(time.time() - keep_recent)
    finally:
        # Now, and also after an interruption: before, the disk may have been full.
        with suppress(StoreError):
            work.write_down()
    return work.pruned


class _Work:
    def __init__(self, store: Store, survey: Survey, plan: Plan, remover: Remover) -> None:
        self._store = store
        self._survey = survey
        self._plan = plan
        self._remover = remover
        self._needed = plan.needed
        self._known = set(survey.manifests)
        self._stored = set(survey.manifests)
        self._used_since = 0.0
        self._folders: set[Path] = set()
        self.pruned = Pruned()

    def remove_images(self) -> None:
        """The tags of the images; an image that was used or published since the plan stays."""

        def remove(image: SurveyedImage) -> None:
            files = [
                found[name]
                for names, found in (
                    (image.needs.manifests, self._survey.manifests),
                    (image.needs.blobs, self._survey.blobs),
                )
                for name in names
                if name in found
            ]
            subjects = self._plan.subjects.get(image.reference, ())
            if image.ref is not None and not image.ref.is_unchanged():
                self._keep(image)
            elif any(kept is each for kept in self.pruned.kept for each in subjects):
                self._keep(image)  # it comes after its subjects
            elif all(map(self._may_go, files)):
                if image.ref is not None:
                    self._take(image.ref.path)
                self.pruned.images.append(image)
            else:
                self._keep(image)

        self._in_batches(self._plan.images, remove)
        self._flush()

    def remove_records(self) -> None:
        """That repositories have the manifests, and what these refer to."""
        kept: dict[Repository, set[str]] = {}
        for image in self.pruned.kept:
            kept.setdefault(image.reference.repository, set()).update(image.needs.manifests)
        records = [
            each
            for repository, found in self._plan.records.items()
            for name, each in found
            if name not in kept.get(repository, ())
        ]
        self._in_batches(records, lambda each: each.is_unchanged() and self._take(each.path))
        self._flush()

    def remove_manifests(self) -> None:
        # Parents first: where one has come back, its children stay with it.
        def remove(item: tuple[str, StoredFile]) -> None:
            name, each = item
            if name in self._needed.manifests:
                return
            if self._may_go(each):
                if self._take(each.path):
                    self.pruned.manifests[name] = each
                self._known.discard(name)
            else:
                self._needed.add(self._survey.needs_of(name))

        self._in_batches(list(self._plan.manifests.items()), remove)
        self._flush()

        def forget(item: tuple[str, Path]) -> None:
            if item[0] not in self._stored:  # it has not come back
                self._take(item[1])

        records = RecordFiles(self._store.refs)
        self._in_batches(records.of_these_referrers(self.pruned.manifests), forget)
        self._flush()

    def remove_empty_folders(self) -> None:
        def remove(folder: Path) -> None:
            with suppress(OSError):  # not empty
                folder.rmdir()

        self._in_batches(RecordFiles(self._store.refs).folders(), remove)

    def remove_blobs(self) -> None:
        def remove(item: tuple[str, StoredFile]) -> None:
            name, each = item
            if name not in self._needed.blobs and self._may_go(each) and self._take(each.path):
                self.pruned.blobs[name] = each

        self._in_batches(list(self._plan.blobs.items()), remove)

    def remove_rubbish(self, older_than: float) -> None:
        for each in self._plan.rubbish:
            if each.path.parent == self._store.staging.root:
                removed = self._store.staging.remove(each.path, older_than)
            else:
                with store_errors(each.path):
                    each.path.unlink(missing_ok=True)
                removed = True
            if removed:
                self.pruned.rubbish.append(each)

    def write_down(self) -> None:
        now, reason = time.time(), self._plan.cause or BY_OPERATOR
        images = self.pruned.images
        add_removed(
            self._store,
            [RemovedImage(now, str(e.reference), e.size, e.used, reason) for e in images],
            self._remover.folder,
        )

    def _in_batches(self, items: Iterable[T], remove: Callable[[T], object]) -> None:
        waiting = list(items)
        waiting.reverse()
        while waiting:
            with self._remover.batch():
                until = time.monotonic() + _BATCH
                self._look()
                # At least one, however long it takes to look.
                remove(waiting.pop())
                while waiting and time.monotonic() < until:
                    remove(waiting.pop())

    def _look(self) -> None:
        """See what came since the plan, and who needs what was used."""
        self._used_since = self._survey.users.since()
        self._stored = self._survey.manifest_names()
        for name in self._stored - self._known:
            self._known.add(name)
            self._needed.add(self._survey.needs_of(name))

    def _may_go(self, each: StoredFile) -> bool:
        return each.used < self._used_since and each.is_unchanged()

    def _keep(self, image: SurveyedImage) -> None:
        self.pruned.kept.append(image)
        self._needed.add(image.needs)

    def _take(self, path: Path) -> bool:
        self._folders.add(path.parent)
        return self._remover.take(path)

    def _flush(self) -> None:
        """A power cut must not bring back a ref whose manifest is gone, or a manifest whose blobs
        are."""
        for folder in self._folders:
            with store_errors(folder), suppress(FileNotFoundError):
                fsync_directory(folder)
        self._folders.clear()
