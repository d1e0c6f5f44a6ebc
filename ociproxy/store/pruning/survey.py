"""All that a store holds: its files as they are now, its images, and what each of them needs.

A survey takes no lock. What it saw may be used or needed again a moment later, so a removal looks
once more at each file (`removal`).
Tests: tests/cli/test_prune_command.py.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from ociproxy.errors import DigestInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.files import digest_of, file_name, store_errors
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import references
from ociproxy.store.look import Look
from ociproxy.store.pruning.stored import StoredFile, StoredFiles
from ociproxy.store.pruning.users import Users

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.store.image import ImageContents
    from ociproxy.store.store import Store

_DIGEST: Final = re.compile(rb"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")


@dataclass(slots=True)
class Needs:
    """File names of manifests, parents first, and of blobs; stored or not."""

    manifests: dict[str, None] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)

    def add(self, other: Needs | ImageNeeds) -> None:
        self.manifests.update(dict.fromkeys(other.manifests))
        self.blobs.update(other.blobs)


class ImageNeeds(NamedTuple):
    """The same of one image, in little memory: there are tens of thousands."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SurveyedImage:
    """An image of `list`: a tag, or a manifest of a repository that no tag reaches. `size` is the
    bytes stored; times are seconds since the epoch."""

    reference: Reference
    digest: Digest
    needs: ImageNeeds
    size: int
    used: float
    top_used: float
    """Of the manifests alone: blobs may be shared with images that are in use."""
    stored: float
    complete: bool


class Survey:
    """Raises StoreError, as its methods do."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.users = Users(store.staging.root)
        self.blobs = _content(store.root / "blobs")
        self.manifests = _content(store.root / "fat", store.root / "img")
        """Indexes first."""
        self._tags: dict[Repository, StoredFiles] = {}
        look = Look(store, strict=True, find_blob=self._find_blob)
        self.images = [self._image(*each, look) for each in references(store, look)]

    def manifest_names(self) -> set[str]:
        """Of all files beside the manifests that are stored at this moment, too: it takes 50 ms for
        100,000."""
        folders = (self._store.root / "fat", self._store.root / "img")
        with store_errors(self._store.root):
            # Interned: most are known here already, and each batch lists them anew.
            return {sys.intern(n) for folder in folders for n in os.listdir(folder)}  # noqa: PTH208

    def needs_of(self, name: str) -> Needs:
        """What a stored manifest needs, itself included; of another file, itself."""
        digest = digest_of(name)
        holder = self._store.manifests.find(digest, use=False) if digest else None
        if holder is None:
            return Needs({name: None})
        look = Look(self._store, strict=True)
        nowhere = Repository("localhost", "any")  # referrers are not looked for
        return self._needs(read_contents(self._store, nowhere, holder.descriptor, look=look))

    def records(self, repository: Repository) -> StoredFiles:
        """The records of the repository's manifests, by the names of those."""
        found = StoredFiles(_record_name)
        for name, record in _files(self._store.refs.folder(repository) / "_manifests"):
            with suppress(DigestInvalid):
                found[_name(Digest.parse(name))] = record
        return found

    def tag(self, image: SurveyedImage) -> StoredFile | None:
        """The record of the image's tag; None where it has none."""
        tags = self._tags.get(image.reference.repository)
        return None if tags is None else tags.get(image.reference.tag or "")

    def _see_tag(self, repository: Repository, tag: str) -> None:
        path = self._store.refs.folder(repository) / "_tags" / tag
        with store_errors(path), suppress(FileNotFoundError):
            state = path.stat()
            self._tags.setdefault(repository, StoredFiles())[tag] = StoredFile.of(path, state)

    def _find_blob(self, digest: Digest) -> tuple[int, float] | None:
        """Bytes of a stored blob, and its last use."""
        each = self.blobs.get(file_name(digest))
        return None if each is None else (each.size, each.used)

    def _image(
        self, reference: Reference, top: Descriptor, resolved: float | None, look: Look
    ) -> SurveyedImage:
        repository = reference.repository
        contents = read_contents(self._store, repository, top, referrers=True, look=look)
        every = self._needs(contents)
        needs = ImageNeeds(tuple(every.manifests), tuple(every.blobs))
        if reference.tag is not None:
            self._see_tag(repository, reference.tag)
        manifests = [self.manifests[name] for name in needs.manifests if name in self.manifests]
        blobs = [self.blobs[name] for name in needs.blobs if name in self.blobs]
        known = resolved or 0.0
        return SurveyedImage(
            reference,
            Digest(*map(sys.intern, top.digest)),
            needs,
            size=sum(each.size for each in (*manifests, *blobs)),
            # A tag of which only the head was asked has no file of its own.
            used=max((each.used for each in (*manifests, *blobs)), default=known),
            top_used=max((each.used for each in manifests), default=known),
            stored=max((each.stored for each in manifests), default=known),
            complete=contents.complete,
        )

    def _needs(self, contents: ImageContents) -> Needs:
        # What is stored in a wrong size is needed all the same: the descriptor may be wrong.
        lacking = [_name(digest) for digest in contents.missing]
        needs = Needs(dict.fromkeys([*map(_name, contents.manifests), *lacking]))
        needs.blobs.update(map(_name, contents.blobs), lacking)
        # Nothing says which blobs a manifest of an unknown kind has: all that it names is needed.
        for other in contents.others:
            holder = self._store.manifests.find(other, use=False)
            named = _DIGEST.findall(holder.raw) if holder is not None else ()
            names = [_name(Digest.parse(each.decode())) for each in named]
            needs.manifests.update(dict.fromkeys(names))
            needs.blobs.update(names)
        return needs


def _name(digest: Digest) -> str:
    """Images share most of what they need: one text in memory for each name."""
    return sys.intern(file_name(digest))


def needs_of_all(images: Iterable[SurveyedImage]) -> Needs:
    found = Needs()
    for image in images:
        found.add(image.needs)
    return found


def _content(*folders: Path) -> StoredFiles:
    """What is named as content is; anything else is not this program's to remove."""
    found = StoredFiles()
    for folder in folders:
        found.update((sys.intern(n), each) for n, each in _files(folder) if digest_of(n))
    return found


def _files(folder: Path) -> Iterator[tuple[str, StoredFile]]:
    """By name, sorted."""
    with store_errors(folder), suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 fast
            path = f"{folder}{os.sep}{name}"
            with suppress(FileNotFoundError):
                yield name, StoredFile.of(path, os.lstat(path))


def _record_name(name: str) -> str:
    """Of a manifest that has this file name."""
    return str(digest_of(name) or name)
