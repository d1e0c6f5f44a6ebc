"""Publishing what a source held: which images are whole, what they are called, what was there.

Nothing is published of a delta whose base is not here, nor, where an existing tag is an error, of a
source that would move one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ociproxy.archive.naming import GivenName, name_all
from ociproxy.archive.promises import Promises
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.archive.importer.tar_import import Received
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.layout import NamedImage
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.examined import Examined
    from ociproxy.store.extract import Extractor
    from ociproxy.store.store import Store

_PUBLISHERS: Final = 8
_BATCH: Final = 64
"""Images that are looked at before their manifests are written, several at a time."""
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
class ImportResult:
    """What became of one image. `previous` is what its tag stood for before, `left_out` the
    platforms that its index offers and the source did not carry."""

    source: str
    name: str
    digest: Digest
    status: Status
    previous: Digest | None = None
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Whole:
    """An image that can be published."""

    reference: Reference
    examined: Examined
    previous: Digest | None

    @property
    def status(self) -> Status:
        """What it is once it is published."""
        if self.previous is None:
            return Status.IMPORTED
        same = self.previous == self.examined.top.digest
        return Status.UNCHANGED if same else Status.REPLACED


class Publisher:
    """Tells each outcome as soon as it is one."""

    def __init__(
        self,
        store: Store,
        on_existing: OnExisting,
        given: GivenName | None,
        tell: Callable[[ImportResult], None],
    ) -> None:
        self._store = store
        self._on_existing = on_existing
        self._given = given
        self._tell = tell

    def publish(self, received: Received, extractor: Extractor) -> None:
        """Raises StoreError."""
        with ThreadPoolExecutor(_PUBLISHERS, "publish") as pool:
            publication = _Publication(
                self._store, self._on_existing, self._tell, received, extractor, pool
            )
            publication.run(self._given)


class _Publication:
    """Of what one source held."""

    def __init__(
        self,
        store: Store,
        on_existing: OnExisting,
        tell: Callable[[ImportResult], None],
        received: Received,
        extractor: Extractor,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._on_existing = on_existing
        self._tell = tell
        self._received = received
        self._extractor = extractor
        self._pool = pool
        self._promises = Promises(received.lock)
        self._repositories: dict[Digest, set[Repository]] | None = None
        """Which repositories a published manifest is in, where there are referrers to place."""

    def run(self, given: GivenName | None) -> None:
        reasons = self._promises.absent_base(self._extractor)
        if reasons:
            for image in self._received.images:
                self._refuse(image, Status.INCOMPLETE, reasons)
                reasons = ["the base of this delta is not in the store: import it first"]
            return
        images: list[NamedImage] = []
        referrers: list[NamedImage] = []
        for image in self._received.images:
            if image.problem:
                self._refuse(image, Status.INCOMPLETE, [image.problem])
            elif image.reference is None and not image.tag and self._subject(image):
                referrers.append(image)
            else:
                images.append(image)
        named, nameless = name_all(images, given)
        for each in nameless:
            status = Status.INCOMPLETE if each.image.reference else Status.UNNAMED
            self._refuse(each.image, status, [each.reason])
        if self._on_existing is OnExisting.ERROR and self._tell_existing(named):
            return
        if referrers:
            self._repositories = {}
        for first in range(0, len(named), _BATCH):
            self._publish_batch(named[first : first + _BATCH])
        self._publish_referrers(referrers)

    def _tell_existing(self, named: list[tuple[NamedImage, Reference]]) -> bool:
        """Whether a tag stands for something else already; then nothing is to be published."""
        found = [(image, reference, self._previous(reference)) for image, reference in named]
        if all(previous in (None, image.descriptor.digest) for image, _, previous in found):
            return False
        for image, reference, previous in found:
            moves = previous not in (None, image.descriptor.digest)
            status = Status.EXISTS if moves else Status.HELD_BACK
            self._told(reference, image.descriptor.digest, status, previous)
        return True

    def _publish_batch(self, named: list[tuple[NamedImage, Reference]]) -> None:
        whole: list[_Whole] = []
        for image, reference in named:
            examined = self._examine(image)
            problems = [*map(str, examined.problems)]
            problems += self._promises.broken(reference, examined)
            if problems:
                self._refuse(image, Status.INCOMPLETE, problems)
                continue
            each = _Whole(reference, examined, self._previous(reference))
            if each.status is Status.REPLACED and self._on_existing is OnExisting.KEEP:
                self._told(reference, image.descriptor.digest, Status.KEPT, each.previous)
                continue
            self._extractor.prepare(examined)
            whole.append(each)
        self._extractor.drain()
        # Mostly waits for the disk, which has time for several at once.
        for each in self._pool.map(self._publish, whole):
            self._note(each.examined, [each.reference.repository])
            left_out = tuple(
                str(child.platform or child.digest) for child in each.examined.left_out
            )
            top = each.examined.top.digest
            self._told(each.reference, top, each.status, each.previous, left_out)

    def _publish(self, each: _Whole) -> _Whole:
        reference = each.reference
        self._extractor.reveal(reference.repository, each.examined, reference.tag)
        return each

    def _publish_referrers(self, waiting: list[NamedImage]) -> None:
        """What has no name but a subject goes where its subject is, be that a referrer itself."""
        while waiting and self._repositories is not None:
            later: list[NamedImage] = []
            for image in waiting:
                subject = self._subject(image)
                repositories = self._repositories.get(subject) if subject else None
                if not repositories:
                    later.append(image)
                    continue
                examined = self._examine(image)
                if examined.problems:
                    self._refuse(image, Status.INCOMPLETE, [*map(str, examined.problems)])
                    continue
                for repository in repositories:
                    self._extractor.publish(repository, examined)
                self._note(examined, repositories)
            if len(later) == len(waiting):
                return  # their subjects are not published: nobody can ask for them
            waiting = later

    def _examine(self, image: NamedImage) -> Examined:
        # A lock says what has to be here. Without one a cut may have taken children of an index.
        sparse = self._received.lock is not None or not self._received.damage
        return self._extractor.examine(image.descriptor, sparse=sparse)

    def _previous(self, reference: Reference) -> Digest | None:
        """What the tag stands for."""
        if reference.tag is None:
            return None
        record = self._store.refs.find_tag(reference.repository, reference.tag)
        return record.descriptor.digest if record else None

    def _subject(self, image: NamedImage) -> Digest | None:
        raw = self._extractor.find_document(image.descriptor.digest)
        try:
            manifest = parse_manifest(raw or b"", image.descriptor.media_type)
        except MalformedManifest:
            return None
        return manifest.subject.digest if manifest.subject else None

    def _note(self, examined: Examined, repositories: Iterable[Repository]) -> None:
        if self._repositories is not None:
            for digest in examined.manifests:
                self._repositories.setdefault(digest, set()).update(repositories)

    def _told(
        self,
        reference: Reference,
        digest: Digest,
        status: Status,
        previous: Digest | None,
        left_out: tuple[str, ...] = (),
    ) -> None:
        source = self._received.source
        self._tell(
            ImportResult(
                source, str(reference), digest, status, previous=previous, left_out=left_out
            )
        )

    def _refuse(self, image: NamedImage, status: Status, problems: list[str]) -> None:
        shown = problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            shown.append(f"and {len(problems) - MOST_PROBLEMS} more")
        digest = image.descriptor.digest
        self._tell(
            ImportResult(self._received.source, str(image), digest, status, problems=tuple(shown))
        )
