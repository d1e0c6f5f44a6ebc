"""What is wrong in a store, by image: damaged files and the images that need them, images that
lack something, records that lead nowhere.

Whether an image is complete is decided by the walk that `list` uses. Referrers are images of their
own here, under the repository of their subject. What a running server or load changes meanwhile is
no finding: an image that lacks something is looked at a second time, in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.oci.reference import Reference
from ociproxy.store.files import file_name
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import references_in
from ociproxy.store.look import Look
from ociproxy.store.records import RecordFiles

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.damage import Damage, FileCheck
    from ociproxy.store.image import ImageContents
    from ociproxy.store.records import Record
    from ociproxy.store.store import Store

MOST_IMAGES: Final = 1000
"""Images that are named for one damaged file: a base layer may be in all of them."""
_IN_QUARANTINE: Final = "manifest not stored; a damaged one is in quarantine/"


@dataclass(frozen=True, slots=True)
class Fault:
    """What an image needs and the store lacks or, where `damaged`, has with wrong bytes in `file`,
    a path in the store."""

    digest: Digest
    reason: str
    damaged: bool = False
    file: str = ""

    def __str__(self) -> str:
        return f"{self.digest} ({self.reason})"


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """An image that cannot be pulled as a whole; `top` is the digest of its manifest."""

    reference: Reference
    top: Digest
    faults: tuple[Fault, ...]

    @property
    def damaged(self) -> bool:
        return any(fault.damaged for fault in self.faults)


@dataclass(slots=True)
class Findings:
    """What a look at all images and records found. `arriving` images are being fetched now. A
    record that cannot be read is damaged; one that leads to a manifest that is not stored leads
    `nowhere`. `hit` has the first `MOST_IMAGES` images that need each damaged file."""

    images: int = 0
    arriving: int = 0
    broken: list[BrokenImage] = field(default_factory=list)
    damaged_records: list[Record] = field(default_factory=list)
    nowhere: list[Record] = field(default_factory=list)
    hit: dict[str, list[Reference]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.broken or self.damaged_records or self.nowhere)


def check(store: Store, damaged: Mapping[str, Damage], unsealed: Collection[str] = ()) -> Findings:
    """Look at each image and each record. `damaged` are the damaged files, `unsealed` blobs that
    were not hashed and have no seal, both by path in the store. Raises StoreError."""
    checking = _Check(store, damaged, unsealed)
    checking.walk(Look(store))
    return checking.judge()


def check_quickly(store: Store, files: FileCheck) -> Findings:
    """The same, and of `files` those that the images do not lead to: so each manifest is read once.
    Raises StoreError."""
    checking = _Check(store, files.damaged, files.unsealed)
    checking.walk(Look(store, hashed=files.hashed))
    files.run()
    # Only the walk tells what a damaged manifest is needed for: a second one, in the rare case.
    return check(store, files.damaged, files.unsealed) if files.damaged else checking.judge()


class _Check:
    def __init__(
        self, store: Store, damaged: Mapping[str, Damage], unsealed: Collection[str]
    ) -> None:
        self._store = store
        self._records = RecordFiles(store.refs)
        self._damaged = damaged
        self._unsealed = unsealed
        self._folders = [folder.name for folder in store.manifests.folders]
        self._quarantined = {path.name for path in store.quarantined()}
        self._findings = Findings()
        self._known: set[tuple[Repository, Digest]] = set()
        """Manifests that a broken image is known to lack: its finding is enough."""
        self._suspects: list[tuple[Reference, Descriptor]] = []
        """What the walk has found that may be wrong."""
        self._doubtful: list[Record] = []

    def walk(self, look: Look) -> None:
        for repository in self._store.refs.repositories():
            there: set[Digest] = set()
            for reference, top, contents in self._images(repository, look):
                self._findings.images += 1
                there.update(contents.manifests)
                if self._faults(contents):
                    self._suspects.append((reference, top))
            found = self._records.of(repository)
            self._doubtful += (each for each in found if self._is_suspect(each, there))
        found = self._records.of_referrers()
        self._doubtful += (each for each in found if self._is_suspect(each))

    def judge(self) -> Findings:
        """Look once more at what may be wrong."""
        for reference, top in self._suspects:
            if self._still_means(reference, top):
                contents = read_contents(self._store, reference.repository, top)
                self._judge(reference, top.digest, self._faults(contents))
        for record in self._doubtful:
            self._judge_record(record)
        return self._findings

    def _images(
        self, repository: Repository, look: Look
    ) -> Iterator[tuple[Reference, Descriptor, ImageContents]]:
        """Tags, images that no tag reaches, and referrers, each once."""
        seen: set[Digest] = set()
        for reference, top, _ in references_in(self._store, repository, look):
            waiting = [(reference, top)]
            for each, descriptor in waiting:
                contents = read_contents(self._store, repository, descriptor, look=look)
                yield each, descriptor, contents
                for subject in contents.manifests:
                    for referrer in look.referrers(repository, subject):
                        if referrer.digest not in seen and self._is_there(referrer.digest):
                            seen.add(referrer.digest)
                            own = Reference(repository, digest=referrer.digest)
                            waiting.append((own, referrer))

    def _faults(self, contents: ImageContents) -> tuple[Fault, ...]:
        faults: dict[Digest, Fault] = {}
        for digest, missing in contents.missing.items():
            # A blob of another size than its manifest says, whose seal is broken, too.
            file = self._blob_file(digest)
            damaged = file in self._unsealed
            faults[digest] = Fault(digest, missing.reason, damaged, file if damaged else "")
        for digest in contents.unstored:
            if file_name(digest) in self._quarantined:
                faults[digest] = Fault(digest, _IN_QUARANTINE)
        for digest, file in self._damaged_parts(contents):
            faults[digest] = _damaged(digest, file)
        return tuple(faults.values())

    def _damaged_parts(self, contents: ImageContents) -> Iterator[tuple[Digest, str]]:
        if not self._damaged:
            return
        for digest in (*contents.manifests, *contents.missing, *contents.unstored):
            file = self._damaged_manifest(digest)
            if file is not None:
                yield digest, file
        for digest in (*contents.blobs, *contents.missing):
            file = self._blob_file(digest)
            if file in self._damaged:
                yield digest, file

    def _blob_file(self, digest: Digest) -> str:
        return f"{self._store.blobs.folder.name}/{file_name(digest)}"

    def _damaged_manifest(self, digest: Digest) -> str | None:
        if not self._damaged:
            return None
        files = (f"{folder}/{file_name(digest)}" for folder in self._folders)
        return next((file for file in files if file in self._damaged), None)

    def _judge(self, reference: Reference, top: Digest, faults: tuple[Fault, ...]) -> None:
        """Report an image that is broken still."""
        repository, staging = reference.repository, self._store.staging
        self._known.update((repository, fault.digest) for fault in faults)
        if not faults:
            return
        found = BrokenImage(reference, top, faults)
        if not found.damaged and any(
            staging.is_arriving(fault.digest, repository.registry) for fault in faults
        ):
            self._findings.arriving += 1
            return
        self._findings.broken.append(found)
        for fault in faults:
            if fault.damaged:
                hit = self._findings.hit.setdefault(fault.file, [])
                if len(hit) < MOST_IMAGES:
                    hit.append(reference)

    def _still_means(self, reference: Reference, top: Descriptor) -> bool:
        """Whether the reference still leads to this manifest: a removal begins with the records."""
        found = Look(self._store).ask(self._store.refs.find, reference)
        return found is not None and found.digest == top.digest

    def _is_suspect(self, record: Record, there: Collection[Digest] = ()) -> bool:
        """`there` are manifests that were just read."""
        digest = record.digest
        if digest is None:
            return True
        # A tag that leads nowhere is an image that lacks its manifest.
        return record.tag is None and (
            self._damaged_manifest(digest) is not None
            or not (digest in there or self._is_there(digest))
        )

    def _is_there(self, digest: Digest) -> bool:
        return self._store.manifests.last_used(digest) is not None

    def _judge_record(self, record: Record) -> None:
        if not self._records.still_says(record):
            return
        digest, repository = record.digest, record.repository
        if digest is None:
            self._findings.damaged_records.append(record)
            return
        if repository is not None and (repository, digest) in self._known:
            return
        file = self._damaged_manifest(digest)
        if file is not None:
            if repository is not None:
                own = Reference(repository, digest=digest)
                self._judge(own, digest, (_damaged(digest, file),))
        elif not self._is_there(digest):
            if repository is not None and file_name(digest) in self._quarantined:
                fault = Fault(digest, _IN_QUARANTINE)
                self._judge(Reference(repository, digest=digest), digest, (fault,))
            else:
                self._findings.nowhere.append(record)


def _damaged(digest: Digest, file: str) -> Fault:
    return Fault(digest, f"{file} is damaged", damaged=True, file=file)
