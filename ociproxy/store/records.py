"""The records of the store as files, for commands that look through all of them or remove some.

Tests: tests/store/test_check.py, tests/load/test_repair.py, tests/cli/test_prune_command.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ociproxy.errors import DigestInvalid, StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.files import file_name, store_errors
from ociproxy.store.look import is_lost
from ociproxy.store.refs import MANIFESTS, TAGS

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from ociproxy.oci.reference import Repository
    from ociproxy.store.refs import Refs


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


class RecordFiles:
    """The store's own records; none of the content below it. Each method raises StoreError."""

    def __init__(self, refs: Refs) -> None:
        self._refs = refs

    def of(self, repository: Repository) -> Iterator[Record]:
        """The records of a repository's tags, then those of its manifests."""
        folder = self._refs.folder(repository)
        for name in self._refs.names(str(folder / TAGS)):
            file = f"{folder}/{TAGS}/{name}"
            yield Record(file, self._digest(file, name, is_tag=True), repository, name)
        yield from self._described(folder / MANIFESTS, repository)

    def of_referrers(self) -> Iterator[Record]:
        """The records of all referrers."""
        root = self._refs.referrers_root
        for subject in self._refs.names(str(root)):
            yield from self._described(root / subject, None)

    def of_these_referrers(self, manifests: Container[str]) -> Iterator[tuple[str, Path]]:
        """The records of referrers that are named in `manifests`, by file name, with those names.
        They are not read."""
        root = self._refs.referrers_root
        for subject in self._refs.names(str(root)):
            for name in self._refs.names(str(root / subject)):
                with suppress(DigestInvalid):
                    referrer = file_name(Digest.parse(name))
                    if referrer in manifests:
                        yield referrer, root / subject / name

    def still_says(self, record: Record) -> bool:
        """Whether the file of a record is there, and says what it said."""
        path = record.path
        found = self._digest(record.file, path.name, is_tag=record.tag is not None)
        return found == record.digest and path.exists()

    def folders(self) -> list[Path]:
        """All folders for records, each after those inside it."""
        found = []
        for root in (self._refs.root, self._refs.referrers_root):
            with store_errors(root):
                walked = [Path(folder) for folder, _, _ in os.walk(root, topdown=False)]
            found += walked[:-1]
        return found

    def _described(self, folder: Path, repository: Repository | None) -> Iterator[Record]:
        for name in self._refs.names(str(folder)):
            file = f"{folder}/{name}"
            yield Record(file, self._digest(file, name, is_tag=False), repository)

    def _digest(self, file: str, name: str, *, is_tag: bool) -> Digest | None:
        """The manifest that a record leads to; None where that is not the one of its name, or the
        disk has lost the record."""
        try:
            if is_tag:
                tagged = self._refs.tag_at(file)
                return tagged.descriptor.digest if tagged else None
            found = self._refs.descriptor_at(file, remember=False)
        except StoreError as exc:
            if not is_lost(exc):
                raise
            return None
        return found.digest if found and str(found.digest) == name else None
