"""What a prune would remove: chosen from a survey, before anything is touched.

`prune --dry-run` prints this plan; a prune carries it out (`carry_out`), and leaves what was used
or is needed again since. A blob goes when no manifest that stays names it; a manifest goes when no
image that stays has it.
Tests: tests/cli/test_prune_command.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ociproxy.oci.reference import is_glob
from ociproxy.store.files import store_errors
from ociproxy.store.pruning.signatures import subjects_of
from ociproxy.store.pruning.stored import StoredFile, StoredFiles
from ociproxy.store.pruning.survey import Needs, needs_of_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.limits import Limits
    from ociproxy.store.pruning.survey import Survey, SurveyedImage
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which images may go: those that fit all that is given. Durations are seconds.

    `unreferenced` are images without a tag, and content that no image needs. With `to_size` (bytes)
    such content goes first, then the least recently used images, until the store is that small.
    With `limits` the same happens until the store keeps them and has room for `wanted` bytes. If it
    keeps them already, nothing goes.
    """

    patterns: tuple[str, ...] = ()
    unused_for: float = 0.0
    older_than: float = 0.0
    to_size: int | None = None
    limits: Limits | None = None
    wanted: int = 0
    unreferenced: bool = False
    keep_recent: float = 3600.0

    def matches(self, image: SurveyedImage) -> bool:
        return not self.patterns or any(map(image.reference.matches, self.patterns))

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing but patterns says what has to stay."""
        return not (self.unused_for or self.older_than or self.unreferenced or self.is_by_size)

    @property
    def is_by_size(self) -> bool:
        return self.to_size is not None or self.limits is not None

    def target(self, size: int) -> int | None:
        """To which size a store of this size is reduced; None where nothing says it."""
        return self.to_size if self.limits is None else self.limits.target(size, self.wanted)

    def cause(self, size: int) -> str | None:
        """The setting that is the reason for the target; None where an operator gave it."""
        return None if self.limits is None else self.limits.cause(size, self.wanted)

    @property
    def takes_loose(self) -> bool:
        """Whether content goes that no image needs. No pattern matches it, for it has no name."""
        return not self.patterns and (self.unreferenced or self.is_by_size)


@dataclass(slots=True)
class Removed:
    """What goes, or has gone. `images` are in the order in which they go, `manifests` parents
    first."""

    images: list[SurveyedImage] = field(default_factory=list)
    manifests: StoredFiles = field(default_factory=StoredFiles)
    blobs: StoredFiles = field(default_factory=StoredFiles)
    rubbish: list[StoredFile] = field(default_factory=list)
    """In `quarantine/`, and abandoned downloads in `pulls/`."""

    @property
    def freed(self) -> int:
        """Bytes."""
        rubbish = sum(each.size for each in self.rubbish)
        return self.manifests.total() + self.blobs.total() + rubbish


@dataclass(slots=True)
class Plan(Removed):
    """What goes, and what is known of the rest."""

    staying: list[SurveyedImage] = field(default_factory=list)
    records: dict[Repository, StoredFiles] = field(default_factory=dict)
    """That a repository has a manifest: the record, by the name of the manifest."""
    needed: Needs = field(default_factory=Needs)
    """By all that stays."""
    size: int = 0
    """Bytes of all content before."""
    subjects: dict[Reference, list[SurveyedImage]] = field(default_factory=dict)
    """Of signatures and the like (`signatures.subjects_of`)."""
    pinned: list[SurveyedImage] = field(default_factory=list)
    """All images that are pinned, with their signatures."""
    pinned_size: int = 0
    """Bytes that are stored of them."""
    pinned_fit: int = 0
    recent: int = 0
    reading: int = 0
    """Images that fit the selection, but are pinned, were used within `keep_recent`, or are
    arriving or needed by a load, an import or an export."""
    recent_files: int = 0
    """Files that no image needs, and that would go if they were not recent or needed so."""
    takes_all: bool = False
    """Whether a pattern with a wildcard matches every image, and nothing else limits it."""
    target: int | None = None
    """To which size, in bytes, the store is to be reduced."""
    cause: str | None = None
    """The setting that says so."""


def make_plan(
    store: Store,
    survey: Survey,
    selection: Selection,
    *,
    is_pinned: Callable[[Reference, Digest], bool],
    now: float,
) -> Plan:
    """Raises StoreError. `now` is seconds since the epoch."""
    with store_errors(store.root):
        planning = _Planning(store, survey, selection, now)
    planning.find_pinned(is_pinned)
    planning.choose_images()
    if not planning.is_kept:
        planning.choose_content()
    return planning.plan


class _Planning:
    def __init__(self, store: Store, survey: Survey, selection: Selection, now: float) -> None:
        self._survey = survey
        self._selection = selection
        self._used_by = now - selection.unused_for
        self._stored_by = now - selection.older_than
        self._kept_since = now - selection.keep_recent
        # What a running load or import may have seen counts as recent.
        self._recent = min(self._kept_since, survey.users.since())
        self._arriving = store.staging.arriving()
        self._of_images = needs_of_all(survey.images)
        # Manifests that no image has keep what they need, unless they go, too.
        unneeded = [name for name in survey.manifests if name not in self._of_images.manifests]
        loose = [name for name in unneeded if self._is_loose(survey.manifests[name])]
        self._kept_loose = Needs()
        for name in set(unneeded) - set(loose):
            self._kept_loose.add(survey.needs_of(name))
        self._loose = dict.fromkeys(n for n in loose if n not in self._kept_loose.manifests)
        self._rubbish = [
            StoredFile.of(path, path.stat())
            for path in (*store.quarantined(), *store.staging.abandoned(self._recent))
        ]
        size = survey.manifests.total() + survey.blobs.total()
        size += sum(each.size for each in self._rubbish)
        target, cause = selection.target(size), selection.cause(size)
        subjects = subjects_of(survey.images)
        self.plan = Plan(size=size, target=target, cause=cause, subjects=subjects)

    @property
    def is_kept(self) -> bool:
        """Whether the store keeps the limits as it is, so that nothing goes."""
        return self._selection.limits is not None and self.plan.target is None

    def find_pinned(self, is_pinned: Callable[[Reference, Digest], bool]) -> None:
        plan, images = self.plan, self._survey.images
        pinned = {id(each) for each in images if is_pinned(each.reference, each.digest)}
        for image in images:
            if not pinned.isdisjoint(map(id, plan.subjects.get(image.reference, ()))):
                pinned.add(id(image))
        plan.pinned = [each for each in images if id(each) in pinned]
        needs = needs_of_all(plan.pinned)
        plan.pinned_size = self._survey.manifests.total(needs.manifests)
        plan.pinned_size += self._survey.blobs.total(needs.blobs)

    def choose_images(self) -> None:
        plan, selection = self.plan, self._selection
        matching = [each for each in self._survey.images if selection.matches(each)]
        wild = any(map(is_glob, selection.patterns))
        everything = len(matching) == len(self._survey.images) > 0
        plan.takes_all = selection.is_unlimited and wild and everything
        if not self.is_kept:
            plan.rubbish = [each for each in self._rubbish if self._is_loose(each)]
        plan.recent_files = self._recent_files()
        pinned = set(map(id, plan.pinned))
        following = self._following(matching)
        candidates = []
        for image in filter(self._fits, matching):
            if image.reference in following:
                continue
            if id(image) in pinned:
                plan.pinned_fit += 1
            elif image.used > self._kept_since:
                plan.recent += 1
            elif self._is_in_use(image):
                plan.reading += 1
            else:
                candidates.append(image)
        candidates.sort(key=lambda each: (each.used, each.top_used, str(each.reference)))
        plan.images = candidates[: self._count(candidates)]
        going = set(map(id, plan.images))
        waiting = [
            image
            for image in self._survey.images
            if image.reference in following
            and id(image) not in pinned
            and not self._is_in_use(image)
        ]
        while found := [
            image
            for image in waiting
            if id(image) not in going and going.issuperset(map(id, plan.subjects[image.reference]))
        ]:  # more than once for signatures of signatures
            going.update(map(id, found))
            plan.images += found
        plan.staying = [each for each in self._survey.images if id(each) not in going]

    def _following(self, matching: list[SurveyedImage]) -> set[Reference]:
        """The signatures that go and stay with their subjects: all but those that a pattern names
        and their subjects not."""
        subjects = self.plan.subjects
        if not self._selection.patterns:
            return set(subjects)
        own = {each.reference for each in matching if each.reference in subjects}
        matched = set(map(id, matching))
        return {
            reference
            for reference, found in subjects.items()
            if reference not in own or not matched.isdisjoint(map(id, found))
        }

    def _is_in_use(self, image: SurveyedImage) -> bool:
        return image.used > self._recent or not self._arriving.isdisjoint(image.needs.blobs)

    def choose_content(self) -> None:
        """Records, manifests and blobs that go with the images, or that no image needs."""
        plan, survey = self.plan, self._survey
        self._of_images = Needs()  # not looked at any more, and as large as what follows
        going, plan.needed = needs_of_all(plan.images), needs_of_all(plan.staying)
        plan.needed.add(self._kept_loose)
        plan.manifests = survey.manifests.only(
            name
            for name in survey.manifests
            if name not in plan.needed.manifests
            and (name in going.manifests or name in self._loose)
        )
        plan.blobs = survey.blobs.only(
            name
            for name in survey.blobs
            if name not in plan.needed.blobs
            and (name in going.blobs or self._is_loose(survey.blobs[name]))
        )
        here: dict[Repository, list[SurveyedImage]] = {}
        for image in plan.images:
            here.setdefault(image.reference.repository, []).append(image)
        kept: dict[Repository, list[SurveyedImage]] = {}
        for image in plan.staying:
            if image.reference.repository in here:
                kept.setdefault(image.reference.repository, []).append(image)
        for repository, images in here.items():
            goes = needs_of_all(images).manifests
            stays = needs_of_all(kept.get(repository, ())).manifests
            records = survey.records(repository)
            plan.records[repository] = records.only(
                name for name in records if name in goes and name not in stays
            )

    def _fits(self, image: SurveyedImage) -> bool:
        if self._selection.unreferenced and image.reference.tag is not None:
            return False
        return image.used <= self._used_by and image.stored <= self._stored_by

    def _is_loose(self, each: StoredFile) -> bool:
        """Whether this file goes if no image needs it."""
        if not self._selection.takes_loose or each.stored > self._stored_by:
            return False
        return max(each.used, each.stored) <= min(self._recent, self._used_by)

    def _recent_files(self) -> int:
        if not self._selection.takes_loose:
            return 0
        needed, survey = self._of_images, self._survey
        return sum(
            max(each.used, each.stored) > self._recent
            for files, names in ((survey.manifests, needed.manifests), (survey.blobs, needed.blobs))
            for each in (files[name] for name in files if name not in names)
        )

    def _count(self, candidates: list[SurveyedImage]) -> int:
        """How many of the candidates go, from the first one on."""
        target, survey = self.plan.target, self._survey
        if target is None:
            return 0 if self.is_kept else len(candidates)
        users = Counter((*self._kept_loose.manifests, *self._kept_loose.blobs))
        for image in survey.images:
            users.update((*image.needs.manifests, *image.needs.blobs))
        size = self.plan.size - sum(each.size for each in self.plan.rubbish)
        for files in (survey.manifests, survey.blobs):
            unneeded = (files[name] for name in files if not users[name])
            size -= sum(each.size for each in unneeded if self._is_loose(each))
        for count, image in enumerate(candidates):
            if size <= target:
                return count
            for name in (*image.needs.manifests, *image.needs.blobs):
                users[name] -= 1
                if not users[name]:
                    size -= survey.manifests.total((name,)) + survey.blobs.total((name,))
        return len(candidates)
