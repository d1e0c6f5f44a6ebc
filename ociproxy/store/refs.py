"""`refs/` and `referrers/`: the tags and manifests of each repository, and the referrers of
subjects.

Each record is a small JSON file, which `jq`, `cp -a` and other processes can use. It is written
after the content that it names, but for a tag of which a client asked the head only. The last
writer wins, for records only keep the answers of upstreams.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar, cast

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Repository
from ociproxy.store.files import file_name, identity, keep, read_unused, store_errors
from ociproxy.store.read_only import TagRecord
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from ociproxy.oci.reference import Reference
    from ociproxy.store.group_commit import Commit, Pending
    from ociproxy.store.read_only import ReadOnlyContent

T = TypeVar("T")

_HOT_RECORDS: Final = 8192
"""Parsed records kept in memory: each saves a read and a parse, not the stat."""
REFERRERS_OF_ONE: Final = 1000
"""Records of one subject. Manifests of any repository may name it, and each is read for a list."""
_RECORD: Final = 1024 * 1024
"""Bytes of a record. Annotations of a referrer may be long; a longer file is no record."""
_TAGS: Final = "_tags"
_MANIFESTS: Final = "_manifests"


class Record(NamedTuple):
    """A file that leads to the manifest `digest`, which is None where the file cannot be parsed, or
    leads to another manifest than its name says. Only the record of a tag has a `tag`, that of a
    referrer no `repository`."""

    file: str
    digest: Digest | None
    repository: Repository | None = None
    tag: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.file)


class Refs:
    def __init__(
        self,
        root: Path,
        referrers_root: Path,
        *,
        staging: Path,
        pending: Pending,
        below: Sequence[ReadOnlyContent] = (),
    ) -> None:
        """`pending` are records that a commit of this process has not published yet. Each `put_`
        method writes its record at once, or as a part of the commit that it is given."""
        self._pending = pending
        self._root = root
        self._referrers_root = referrers_root
        self._staging = staging
        self._below = [content.records for content in below]
        self._hot: BoundedCache[str, tuple[tuple[int, int, int], object]] = BoundedCache(
            _HOT_RECORDS
        )

    def folder(self, repository: Repository) -> Path:
        """Where the records of a repository are: `_tags/<tag>` and `_manifests/<digest>`."""
        return self._root / repository.registry / repository.name

    def remembered_tag(self, repository: Repository, tag: str) -> Digest | None:
        """The manifest of a tag whose record was read before; takes no look at the disk."""
        hot = self._hot.get(self._path(repository, _TAGS, tag))
        return None if hot is None else cast("TagRecord", hot[1]).descriptor.digest

    def remembers(self, repository: Repository, digest: Digest) -> bool:
        """Whether the record of a manifest was read before; takes no look at the disk."""
        return self._hot.get(self._path(repository, _MANIFESTS, str(digest))) is not None

    def find_tag(self, repository: Repository, tag: str) -> TagRecord | None:
        """The record of a tag; None if there is none, or it is damaged. Raises StoreError."""
        own = self._find(self._path(repository, _TAGS, tag), TagRecord.from_json)
        if own is not None or not self._below:
            return own
        found = (records.tags.get(repository, {}).get(tag) for records in self._below)
        return next((record for record in found if record is not None), None)

    def put_tag(
        self, repository: Repository, tag: str, record: TagRecord, commit: Commit | None = None
    ) -> None:
        """What the tag meant before is remembered in the record. Raises StoreError."""
        path = self._path(repository, _TAGS, tag)
        record = record.after(self._find(path, TagRecord.from_json))
        self._put(path, record.to_json(), record, commit)

    def left_behind(self, repository: Repository) -> set[Digest]:
        """The manifests that a tag meant before it moved. Raises StoreError."""
        found = (self.find_tag(repository, tag) for tag in self.tags(repository))
        return {digest for record in found if record is not None for digest in record.left}

    def find_manifest(self, repository: Repository, digest: Digest) -> Descriptor | None:
        """The descriptor under which this repository has this manifest, or None. Raises
        StoreError."""
        own = self._find(self._path(repository, _MANIFESTS, str(digest)), _descriptor)
        if own is not None or not self._below:
            return own
        found = (records.manifests.get(repository, {}).get(digest) for records in self._below)
        return next((descriptor for descriptor in found if descriptor is not None), None)

    def put_manifest(
        self, repository: Repository, descriptor: Descriptor, commit: Commit | None = None
    ) -> None:
        path = self._path(repository, _MANIFESTS, str(descriptor.digest))
        self._put_descriptor(path, descriptor, commit)

    def put_referrer(
        self, subject: Digest, referrer: Descriptor, commit: Commit | None = None
    ) -> None:
        """Blocks. Above `REFERRERS_OF_ONE` records of the subject no more are kept."""
        folder = f"{self._referrers_root}/{subject}"
        path = f"{folder}/{referrer.digest}"
        if not os.path.exists(path) and len(self._names(folder)) >= REFERRERS_OF_ONE:  # noqa: PTH110
            log.event(logging.WARNING, "too many referrers", digest=subject, kept=REFERRERS_OF_ONE)
            return
        self._put_descriptor(path, referrer, commit)

    def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Manifests of this repository that refer to the subject, ordered by digest. Blocks: it
        reads up to `REFERRERS_OF_ONE` records. Raises StoreError."""
        found: dict[Digest, Descriptor] = {}
        for records in self._below:
            found.update(records.referrers.get(subject, {}))
        directory = f"{self._referrers_root}/{subject}"
        for name in self._names(directory)[:REFERRERS_OF_ONE]:
            descriptor = self._find(f"{directory}/{name}", _descriptor)
            if descriptor:
                found[descriptor.digest] = descriptor
        ordered = (found[digest] for digest in sorted(found))
        return [each for each in ordered if self.find_manifest(repository, each.digest)]

    def subjects(self) -> set[str]:
        """All that `referrers` may have an answer for, as text. Raises StoreError."""
        below = (str(each) for records in self._below for each in records.referrers)
        return {*self._names(str(self._referrers_root)), *below}

    def tags(self, repository: Repository) -> list[str]:
        """The tags of a repository, sorted. Raises StoreError."""
        own = self._names(self._path(repository, _TAGS, "."))
        below = (records.tags.get(repository, {}) for records in self._below)
        return sorted({*own, *(tag for tags in below for tag in tags)}) if self._below else own

    def find(self, reference: Reference) -> Descriptor | None:
        """What a tag or a digest means in this repository now; of both the tag decides. Raises
        StoreError."""
        repository = reference.repository
        if reference.tag is not None:
            record = self.find_tag(repository, reference.tag)
            return None if record is None else record.descriptor
        return self.find_manifest(repository, reference.digest) if reference.digest else None

    def has_repository(self, repository: Repository) -> bool:
        folder = self._root / repository.registry / repository.name
        return (
            folder.is_dir()
            or any(self._pending.names(f"{folder}/{kind}") for kind in (_TAGS, _MANIFESTS))
            or any(repository in records.manifests for records in self._below)
        )

    def manifests(self, repository: Repository) -> list[Digest]:
        """The manifests of a repository in the store's own files, sorted. Raises StoreError."""
        found = []
        for name in self._names(self._path(repository, _MANIFESTS, ".")):
            with suppress(DigestInvalid):
                found.append(Digest.parse(name))
        return found

    def records_of_referrers(self, manifests: Container[str]) -> Iterator[tuple[str, Path]]:
        """The records of referrers that are named in `manifests`, by file name, with those names.
        Raises StoreError."""
        for subject in self._names(str(self._referrers_root)):
            for name in self._names(f"{self._referrers_root}/{subject}"):
                with suppress(DigestInvalid):
                    referrer = file_name(Digest.parse(name))
                    if referrer in manifests:
                        yield referrer, self._referrers_root / subject / name

    def folders(self) -> list[Path]:
        """All folders for records, each after those inside it. Raises StoreError."""
        found = []
        for root in (self._root, self._referrers_root):
            with store_errors(root):
                walked = [Path(folder) for folder, _, _ in os.walk(root, topdown=False)]
            found += walked[:-1]
        return found

    def newest_manifests(self, repository: Repository) -> list[Digest]:
        """The same, the newest first."""
        folder = Path(self._path(repository, _MANIFESTS, "."))
        found: list[tuple[float, Digest]] = []
        for name in self._pending.names(str(folder)):
            with suppress(DigestInvalid):
                found.append((inf, Digest.parse(name)))
        with store_errors(folder), suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                with suppress(DigestInvalid, FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, Digest.parse(entry.name)))
        newest = sorted(found, key=itemgetter(0), reverse=True)
        return list(dict.fromkeys(digest for _, digest in newest))

    def manifests_state(self, repository: Repository) -> tuple[int, int] | None:
        """Inode and time of modification (ns) of a folder: they change when a manifest of the
        repository comes or goes. None if it has none, one is about to come, or the folder cannot be
        read."""
        folder = self._path(repository, _MANIFESTS, ".")
        if self._pending and self._pending.names(folder[:-2]):
            return None
        try:
            state = os.stat(folder)  # noqa: PTH116 hot path
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns

    def repositories(self) -> Iterator[Repository]:
        """Every repository of every registry, sorted; reads the store while the caller iterates."""
        for directory, folders, _ in os.walk(self._root):
            folders.sort()
            if _TAGS not in folders and _MANIFESTS not in folders:
                continue
            folders[:] = [name for name in folders if name not in (_TAGS, _MANIFESTS)]
            registry, *name = Path(directory).relative_to(self._root).parts or ("",)
            try:
                yield Repository.parse(registry, "/".join(name))
            except NameInvalid:
                continue

    def records(self, repository: Repository) -> Iterator[Record]:
        """The records of a repository in the store's own files. Raises StoreError."""
        folder = self._path(repository, _TAGS, "")
        for name in self._names(folder):
            file = f"{folder}{name}"
            yield Record(file, self._digest(file, name, is_tag=True), repository, name)
        yield from self._described(self._path(repository, _MANIFESTS, ""), repository)

    def referrer_records(self) -> Iterator[Record]:
        """The records of all referrers, in the same way."""
        for subject in self._names(str(self._referrers_root)):
            yield from self._described(f"{self._referrers_root}/{subject}/", None)

    def still_says(self, record: Record) -> bool:
        """Whether the file of a record is there, and says what it said. Raises StoreError."""
        found = self._digest(record.file, record.path.name, is_tag=record.tag is not None)
        return found == record.digest and record.path.exists()

    def _described(self, folder: str, repository: Repository | None) -> Iterator[Record]:
        for name in self._names(folder):
            file = f"{folder}{name}"
            yield Record(file, self._digest(file, name, is_tag=False), repository)

    def _digest(self, path: str, name: str, *, is_tag: bool) -> Digest | None:
        """The manifest that the record at a path leads to; `name` is that of its place."""
        if is_tag:
            tagged = self._find(path, TagRecord.from_json)
            return tagged.descriptor.digest if tagged else None
        found = self._find(path, _descriptor, remember=False)  # a caller looks at all, once
        return found.digest if found and str(found.digest) == name else None

    def _path(self, repository: Repository, kind: str, name: str) -> str:
        # Parsed names cannot hold '..' or begin with '/'. No component of a repository begins with
        # '_', so none is taken for a folder of records.
        return f"{self._root}/{repository.registry}/{repository.name}/{kind}/{name}"

    def _find(
        self, path: str, parse: Callable[[dict[str, object]], T | None], *, remember: bool = True
    ) -> T | None:
        """The record at a path; None if there is none, or it is damaged. It is parsed once while
        its file stays the same, so callers give a path always the same `parse`."""
        # Before the file: a commit that ends just now takes it out after it has its name.
        if self._pending and path in self._pending:
            pending = self._pending.get(path)
            if pending is not None:
                return cast("T", pending)
        try:
            hot = self._hot.get(path)
            if hot is not None and hot[0] == identity(os.stat(path)):  # noqa: PTH116 hot path
                return cast("T", hot[1])
            data, state = read_unused(path, _RECORD)
            document = json.loads(data)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError:
            with store_errors(Path(path)):
                raise
        if not isinstance(document, dict):
            return None
        record = parse(document)
        if remember and record is not None:
            self._hot.put(path, (identity(state), record))
        return record

    def _put_descriptor(self, path: str, descriptor: Descriptor, commit: Commit | None) -> None:
        # A record that is written again counts as new: it is not removed as the old one.
        if self._find(path, _descriptor) != descriptor or not keep(path, time.time()):
            self._put(path, descriptor.to_json(), descriptor, commit)

    def _put(
        self, path: str, document: dict[str, object], value: object, commit: Commit | None
    ) -> None:
        # A line each, as with `indent`, which would keep json from its fast encoder.
        data = json.dumps(document, separators=(",\n ", ": ")).encode() + b"\n"
        if commit is None:
            write_atomically(Path(path), data, staging=self._staging)
        else:
            commit.stage(path, data, value, record=True)

    def _names(self, directory: str) -> list[str]:
        # Callers end a folder with `/` or `/.` as well.
        pending = self._pending.names(os.path.normpath(directory)) if self._pending else []
        try:
            return sorted({*pending, *os.listdir(directory)})  # noqa: PTH208 a path as text: hot path
        except FileNotFoundError:
            return sorted(pending)
        except OSError:
            with store_errors(Path(directory)):
                raise


def _descriptor(document: dict[str, object]) -> Descriptor | None:
    try:
        return Descriptor.from_json(document)
    except MalformedManifest:
        return None
