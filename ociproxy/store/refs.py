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
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest, text_in
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.files import identity, keep, read_unused, store_errors
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ociproxy.store.group_commit import Commit
    from ociproxy.store.staging import Pending

T = TypeVar("T")

_ENCODER: Final = json.JSONEncoder(separators=(",\n ", ": "))
"""A line for each field, as with `indent`, which would keep json from its fast encoder."""
_HOT_RECORDS: Final = 8192
"""Parsed records kept in memory: each saves a read and a parse, not the stat."""
REFERRERS_OF_ONE: Final = 1000
"""Records of one subject. Manifests of any repository may name it, and each is read for a list."""
_RECORD: Final = 1024 * 1024
"""Bytes of a record. Annotations of a referrer may be long; a longer file is no record."""
_LEFT: Final = 64
"""Manifests that a tag meant before: of one that moves daily, two months."""
TAGS: Final = "_tags"
MANIFESTS: Final = "_manifests"


@dataclass(frozen=True, slots=True)
class TagRecord:
    """The manifest that a tag meant at this upstream; `resolved` is seconds since the epoch. `left`
    are the manifests that it meant before, the newest first."""

    descriptor: Descriptor
    resolved: float
    upstream: str
    left: tuple[Digest, ...] = ()

    @staticmethod
    def from_json(document: dict[str, object]) -> TagRecord | None:
        """None for a damaged one."""
        try:
            descriptor = Descriptor.from_json(document.get("descriptor"))
            resolved = datetime.fromisoformat(text_in(document.get("resolved"))).timestamp()
        except ValueError:  # MalformedManifest is one
            return None
        left = document.get("left")
        digests: list[Digest] = []
        for each in left if isinstance(left, list) else ():
            with suppress(DigestInvalid):
                digests.append(Digest.parse(str(each)))
        upstream = str(document.get("upstream", ""))
        return TagRecord(descriptor, resolved, upstream, tuple(digests))

    def to_json(self) -> dict[str, object]:
        when = datetime.fromtimestamp(self.resolved, UTC)
        return {
            "descriptor": self.descriptor.to_json(),
            "resolved": when.isoformat(timespec="milliseconds"),
            "upstream": self.upstream,
            **({"left": list(map(str, self.left))} if self.left else {}),
        }

    def after(self, before: TagRecord | None) -> TagRecord:
        """This record in the place of another one, whose manifest it remembers."""
        left = () if before is None else (before.descriptor.digest, *before.left)
        moved = dict.fromkeys(each for each in left if each != self.descriptor.digest)
        return replace(self, left=tuple(moved)[:_LEFT])


@dataclass(frozen=True, slots=True)
class Records:
    """Tags by repository and tag, manifests by repository and digest, referrers by subject and
    digest."""

    tags: dict[Repository, dict[str, TagRecord]] = field(default_factory=dict)
    manifests: dict[Repository, dict[Digest, Descriptor]] = field(default_factory=dict)
    referrers: dict[Digest, dict[Digest, Descriptor]] = field(default_factory=dict)


class Refs:
    def __init__(
        self,
        root: Path,
        referrers_root: Path,
        *,
        staging: Path,
        pending: Pending,
        below: Sequence[Records] = (),
    ) -> None:
        """`pending` are records that a commit of this process has not published yet. Each `put_`
        method writes its record at once, or as a part of the commit that it is given."""
        self._pending = pending
        self.root = root
        self.referrers_root = referrers_root
        self._staging = staging
        self._below = below
        self._hot: BoundedCache[str, tuple[tuple[int, int, int], object]] = BoundedCache(
            _HOT_RECORDS
        )

    def folder(self, repository: Repository) -> Path:
        """Where the records of a repository are: `_tags/<tag>` and `_manifests/<digest>`."""
        return self.root / repository.registry / repository.name

    def remembered_tag(self, repository: Repository, tag: str) -> Digest | None:
        """The manifest of a tag whose record was read before; takes no look at the disk."""
        hot = self._hot.get(self._path(repository, TAGS, tag))
        return None if hot is None else cast("TagRecord", hot[1]).descriptor.digest

    def remembers(self, repository: Repository, digest: Digest) -> bool:
        """Whether the record of a manifest was read before; takes no look at the disk."""
        return self._hot.get(self._path(repository, MANIFESTS, str(digest))) is not None

    def find_tag(self, repository: Repository, tag: str) -> TagRecord | None:
        """The record of a tag; None if there is none, or it is damaged. Raises StoreError."""
        own = self.tag_at(self._path(repository, TAGS, tag))
        if own is not None or not self._below:
            return own
        found = (records.tags.get(repository, {}).get(tag) for records in self._below)
        return next((record for record in found if record is not None), None)

    def put_tag(
        self, repository: Repository, tag: str, record: TagRecord, commit: Commit | None = None
    ) -> None:
        """What the tag meant before is remembered in the record. Raises StoreError."""
        path = self._path(repository, TAGS, tag)
        record = record.after(self.tag_at(path))
        self._put(path, record.to_json(), record, commit)

    def left_behind(self, repository: Repository) -> set[Digest]:
        """The manifests that a tag meant before it moved. Raises StoreError."""
        found = (self.find_tag(repository, tag) for tag in self.tags(repository))
        return {digest for record in found if record is not None for digest in record.left}

    def find_manifest(self, repository: Repository, digest: Digest) -> Descriptor | None:
        """The descriptor under which this repository has this manifest, or None. Raises
        StoreError."""
        own = self.descriptor_at(self._path(repository, MANIFESTS, str(digest)))
        if own is not None or not self._below:
            return own
        found = (records.manifests.get(repository, {}).get(digest) for records in self._below)
        return next((descriptor for descriptor in found if descriptor is not None), None)

    def put_manifest(
        self, repository: Repository, descriptor: Descriptor, commit: Commit | None = None
    ) -> None:
        path = self._path(repository, MANIFESTS, str(descriptor.digest))
        self._put_descriptor(path, descriptor, commit)

    def put_referrer(
        self, subject: Digest, referrer: Descriptor, commit: Commit | None = None
    ) -> None:
        """Blocks. Above `REFERRERS_OF_ONE` records of the subject no more are kept."""
        folder = f"{self.referrers_root}/{subject}"
        path = f"{folder}/{referrer.digest}"
        if not os.path.exists(path) and len(self.names(folder)) >= REFERRERS_OF_ONE:  # noqa: PTH110
            log.event(logging.WARNING, "too many referrers", digest=subject, kept=REFERRERS_OF_ONE)
            return
        self._put_descriptor(path, referrer, commit)

    def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Manifests of this repository that refer to the subject, ordered by digest. Blocks: it
        reads up to `REFERRERS_OF_ONE` records. Raises StoreError."""
        found: dict[Digest, Descriptor] = {}
        for records in self._below:
            found.update(records.referrers.get(subject, {}))
        directory = f"{self.referrers_root}/{subject}"
        for name in self.names(directory)[:REFERRERS_OF_ONE]:
            descriptor = self.descriptor_at(f"{directory}/{name}")
            if descriptor:
                found[descriptor.digest] = descriptor
        ordered = (found[digest] for digest in sorted(found))
        return [each for each in ordered if self.find_manifest(repository, each.digest)]

    def subjects(self) -> set[str]:
        """All that `referrers` may have an answer for, as text. Raises StoreError."""
        below = (str(each) for records in self._below for each in records.referrers)
        return {*self.names(str(self.referrers_root)), *below}

    def tags(self, repository: Repository) -> list[str]:
        """The tags of a repository, sorted. Raises StoreError."""
        own = self.names(self._path(repository, TAGS, "."))
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
        folder = self.root / repository.registry / repository.name
        return (
            folder.is_dir()
            or any(self._pending.names(f"{folder}/{kind}") for kind in (TAGS, MANIFESTS))
            or any(repository in records.manifests for records in self._below)
        )

    def manifests(self, repository: Repository) -> list[Digest]:
        """The manifests of a repository in the store's own files, sorted. Raises StoreError."""
        found = []
        for name in self.names(self._path(repository, MANIFESTS, ".")):
            with suppress(DigestInvalid):
                found.append(Digest.parse(name))
        return found

    def newest_manifests(self, repository: Repository) -> list[Digest]:
        """The same, the newest first."""
        folder = Path(self._path(repository, MANIFESTS, "."))
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
        folder = self._path(repository, MANIFESTS, ".")
        if self._pending and self._pending.names(folder[:-2]):
            return None
        try:
            state = os.stat(folder)  # noqa: PTH116 hot path
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns

    def repositories(self) -> Iterator[Repository]:
        """Every repository of every registry, sorted; reads the store while the caller iterates."""
        for directory, folders, _ in os.walk(self.root):
            folders.sort()
            if TAGS not in folders and MANIFESTS not in folders:
                continue
            folders[:] = [name for name in folders if name not in (TAGS, MANIFESTS)]
            registry, *name = Path(directory).relative_to(self.root).parts or ("",)
            try:
                yield Repository.parse(registry, "/".join(name))
            except NameInvalid:
                continue

    def _path(self, repository: Repository, kind: str, name: str) -> str:
        # Parsed names cannot hold '..' or begin with '/'. No component of a repository begins with
        # '_', so none is taken for a folder of records.
        return f"{self.root}/{repository.registry}/{repository.name}/{kind}/{name}"

    def tag_at(self, path: str) -> TagRecord | None:
        """The record of a tag in this file; None if there is none, or it is damaged. Raises
        StoreError."""
        return self._find(path, TagRecord.from_json)

    def descriptor_at(self, path: str, *, remember: bool = True) -> Descriptor | None:
        """The record of a manifest or a referrer in this file, in the same way. A caller that looks
        through all files has none remembered."""
        return self._find(path, _descriptor, remember=remember)

    def _find(
        self, path: str, parse: Callable[[dict[str, object]], T | None], *, remember: bool = True
    ) -> T | None:
        """It is parsed once while its file stays the same: a path has always the same `parse`."""
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
        if self.descriptor_at(path) != descriptor or not keep(path, time.time()):
            self._put(path, descriptor.to_json(), descriptor, commit)

    def _put(
        self, path: str, document: dict[str, object], value: object, commit: Commit | None
    ) -> None:
        data = _ENCODER.encode(document).encode() + b"\n"
        if commit is None:
            write_atomically(Path(path), data, staging=self._staging)
        else:
            commit.stage(path, data, value, record=True)

    def names(self, directory: str) -> list[str]:
        """The records in a folder, sorted; none where there is no folder. Raises StoreError."""
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
