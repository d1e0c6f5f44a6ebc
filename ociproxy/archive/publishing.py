"""Publishing what a source held: which images are whole, what they are called, what was there.

Nothing is published of a delta whose base is not here, nor, where an existing tag is an error, of a
source that would move one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ociproxy.errors import NameInvalid
from ociproxy.manifest import MalformedManifest, parse_manifest
from ociproxy.reference import DEFAULT_TAG, Reference, Repository, check_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.archive.lock import Lock
    from ociproxy.archive.receive import Received
    from ociproxy.digest import Digest
    from ociproxy.extract import Examined, Extractor
    from ociproxy.layout import NamedImage
    from ociproxy.store.store import Store

MOST_PROBLEMS: Final = 100
"""Of one image that are told one by one."""


class OnExisting(StrEnum):
    """What to do where a tag is there and stands for another digest."""

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


EXIT_CODES: Final = {
    Status.INCOMPLETE: 5,
    Status.EXISTS: 3,
    Status.HELD_BACK: 3,
    Status.UNNAMED: 2,
}
"""Of what is not published; the first in this order that happened counts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image. `previous` is what its tag stood for before, `left_out` the
    platforms that its index offers and the source did not carry."""

    source: str
    name: str
    digest: Digest
    status: Status
    previous: Digest | None = None
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GivenName:
    """What to call images that have no full name; without a tag they keep the one they have."""

    repository: Repository
    tag: str | None = None

    @staticmethod
    def parse(text: str) -> GivenName:
        """Raises NameInvalid, DigestInvalid."""
        reference = Reference.parse(text)
        if reference.digest is not None:
            raise NameInvalid(text, "give REGISTRY/REPOSITORY or REGISTRY/REPOSITORY:TAG")
        has_tag = ":" in text.rpartition("/")[2]
        return GivenName(reference.repository, reference.tag if has_tag else None)


@dataclass(slots=True)
class _Whole:
    """An image that can be published."""

    image: NamedImage
    reference: Reference
    examined: Examined
    previous: Digest | None


class Publisher:
    """Tells each outcome as soon as it is one."""

    def __init__(
        self,
        store: Store,
        on_existing: OnExisting,
        given: GivenName | None,
        tell: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._on_existing = on_existing
        self._given = given
        self._tell = tell

    def publish(self, received: Received, extractor: Extractor) -> None:
        """Raises StoreError."""
        _Publication(self, received, extractor).run()


class _Publication:
    def __init__(self, publisher: Publisher, received: Received, extractor: Extractor) -> None:
        self._store = publisher._store
        self._on_existing = publisher._on_existing
        self._given = publisher._given
        self._tell = publisher._tell
        self._received = received
        self._extractor = extractor
        self._repositories: dict[Digest, set[Repository]] = {}
        """Which repositories a published manifest is in."""
        self._named: set[Reference] = set()

    def run(self) -> None:
        lock = self._received.lock
        absent = _absent_base(lock, self._extractor)
        if absent:
            for image in self._received.images:
                self._incomplete(image, absent)
            return
        whole: list[_Whole] = []
        loose: list[tuple[NamedImage, Examined]] = []
        for image in self._received.images:
            if image.problem:
                self._incomplete(image, [image.problem])
                continue
            examined = self._examine(image)
            problems = self._problems(image, examined)
            if problems:
                self._incomplete(image, problems)
            elif image.reference is None:
                loose.append((image, examined))
            else:
                whole.append(self._found(image, image.reference, examined))
        nameless = self._name(loose, whole)
        self._publish_all(whole)
        self._publish_referrers(nameless)

    def _examine(self, image: NamedImage) -> Examined:
        # A lock says what has to be here. Without one a cut may have taken children of an index.
        sparse = self._received.lock is not None or not self._received.damage
        return self._extractor.examine(image.descriptor, sparse=sparse)

    def _problems(self, image: NamedImage, examined: Examined) -> list[str]:
        problems = [str(problem) for problem in examined.problems]
        lock = self._received.lock
        if lock is None:
            return problems
        gaps = {digest for each in lock.images for digest in each.missing}
        problems += [
            f"manifest {child.digest}: listed, but not in the archive"
            for child in examined.left_out
            if child.digest in lock.contents and child.digest not in gaps
        ]
        locked = image.reference and lock.find(image.reference)
        if locked and not locked.complete:
            problems.append("was incomplete when it was exported, with --allow-partial")
        return problems

    def _name(
        self, loose: list[tuple[NamedImage, Examined]], whole: list[_Whole]
    ) -> list[Examined]:
        """Give the images without a full name the one that was given; returns the rest."""
        rest: list[Examined] = []
        taken = {each.reference for each in whole}
        for image, examined in loose:
            if self._subject(examined) is not None:
                rest.append(examined)
                continue
            try:
                reference = self._given_name(image)
            except NameInvalid as exc:
                self._unnamed(image, str(exc))
                continue
            if reference in taken:
                self._unnamed(image, f"another image here is {reference} already")
                continue
            taken.add(reference)
            whole.append(self._found(image, reference, examined))
        return rest

    def _given_name(self, image: NamedImage) -> Reference:
        """Raises NameInvalid, saying what to do."""
        if self._given is None:
            what = f"only the tag {image.tag!r}" if image.tag else "no name"
            raise NameInvalid(
                str(image), f"has {what} in the archive; say --name REGISTRY/REPOSITORY[:TAG]"
            )
        tag = image.tag or self._given.tag or DEFAULT_TAG
        if self._given.tag is not None:
            tag = self._given.tag
        check_tag(tag)
        return Reference(self._given.repository, tag)

    def _found(self, image: NamedImage, reference: Reference, examined: Examined) -> _Whole:
        record = reference.tag and self._store.refs.find_tag(reference.repository, reference.tag)
        return _Whole(image, reference, examined, record.descriptor.digest if record else None)

    def _publish_all(self, whole: list[_Whole]) -> None:
        moved = [each for each in whole if each.previous not in (None, each.examined.top.digest)]
        if moved and self._on_existing is OnExisting.ERROR:
            for each in whole:
                self._done(each, Status.EXISTS if each in moved else Status.HELD_BACK)
            return
        for each in whole:
            if each.previous is None:
                status = Status.IMPORTED
            elif each.previous == each.examined.top.digest:
                status = Status.UNCHANGED
            elif self._on_existing is OnExisting.KEEP:
                self._done(each, Status.KEPT)
                continue
            else:
                status = Status.REPLACED
            self._extractor.publish(each.reference.repository, each.examined, each.reference.tag)
            self._note(each.examined, [each.reference.repository])
            self._done(each, status)

    def _publish_referrers(self, nameless: list[Examined]) -> None:
        """What has no name but a subject goes where its subject is, be that a referrer itself."""
        waiting = nameless
        while waiting:
            later: list[Examined] = []
            for examined in waiting:
                repositories = self._repositories.get(
                    self._subject(examined) or examined.top.digest
                )
                if repositories is None:
                    later.append(examined)
                    continue
                for repository in repositories:
                    self._extractor.publish(repository, examined)
                self._note(examined, repositories)
            if len(later) == len(waiting):
                return  # their subjects are not published: nobody can ask for them
            waiting = later

    def _subject(self, examined: Examined) -> Digest | None:
        raw = self._extractor.find_document(examined.top.digest)
        try:
            manifest = parse_manifest(raw or b"", examined.top.media_type)
        except MalformedManifest:
            return None
        return manifest.subject.digest if manifest.subject else None

    def _note(self, examined: Examined, repositories: Iterable[Repository]) -> None:
        for digest in examined.manifests:
            self._repositories.setdefault(digest, set()).update(repositories)

    def _done(self, each: _Whole, status: Status) -> None:
        left_out = (str(child.platform or child.digest) for child in each.examined.left_out)
        self._tell(
            Outcome(
                self._received.source,
                str(each.reference),
                each.examined.top.digest,
                status,
                previous=each.previous,
                left_out=tuple(left_out),
            )
        )

    def _incomplete(self, image: NamedImage, problems: list[str]) -> None:
        shown = problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            shown.append(f"and {len(problems) - MOST_PROBLEMS} more")
        self._tell(
            Outcome(
                self._received.source,
                str(image),
                image.descriptor.digest,
                Status.INCOMPLETE,
                problems=tuple(shown),
            )
        )

    def _unnamed(self, image: NamedImage, reason: str) -> None:
        self._tell(
            Outcome(
                self._received.source,
                str(image),
                image.descriptor.digest,
                Status.UNNAMED,
                problems=(reason,),
            )
        )


def _absent_base(lock: Lock | None, extractor: Extractor) -> list[str]:
    """What a delta builds on and the store does not have."""
    if lock is None:
        return []
    return [
        f"{digest}: of the base of this delta, and not in the store; import the base first"
        for digest in sorted(lock.omitted, key=str)
        if not extractor.holds(digest)
    ]
