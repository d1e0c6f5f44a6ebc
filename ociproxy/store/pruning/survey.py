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
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ociproxy.errors import DigestInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.files import digest_of, file_name, store_errors
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import references
from ociproxy.store.look import Look
from ociproxy.store.pruning.users import Users

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.store.image import ImageContents
    from ociproxy.store.store import Store

_DIGEST: Final = re.compile(rb"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")


class StoredFile(NamedTuple):
    """A file as it was at one moment; `used` and `stored` are seconds since the epoch. There are
    hundreds of thousands, so the path is a text: it takes less time and memory."""

    file: str
    size: int
    state: tuple[int, int, int]
    used: float
    stored: float

    @staticmethod
    def of(file: str | Path, state: os.stat_result) -> StoredFile:
        return StoredFile(
            os.fspath(file), state.st_size, _state(state), state.st_atime, state.st_mtime
        )

    @property
    def path(self) -> Path:
        return Path(self.file)

    def is_unchanged(self) -> bool:
        """Whether it is there, and was neither used nor written again since."""
        try:
            return _state(os.stat(self.file)) == self.state  # noqa: PTH116 of each in a batch
        except FileNotFoundError:
            return False


def _state(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_mtime_ns, state.st_atime_ns


@dataclass(slots=True)
class Needs:
    """File names of manifests, parents first, and of blobs; stored or not."""

    manifests: dict[str, None] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)

    def add(self, other: Needs) -> None:
        self.manifests.update(other.manifests)
        self.blobs |= other.blobs


@dataclass(frozen=True, slots=True, eq=False)
class SurveyedImage:
    """An image of `list`: a tag, or a manifest of a repository that no tag reaches. `size` is the
    bytes stored; times are seconds since the epoch."""

    reference: Reference
    digest: Digest
    needs: Needs
    ref: StoredFile | None
    """The tag's record; None where the image has no tag."""
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
        self.manifests = {**_content(store.root / "fat"), **_content(store.root / "img")}
        """Indexes first."""
        look = Look(store, strict=True)
        self.images = [self._image(*each, look) for each in references(store, look)]

    def manifest_names(self) -> set[str]:
        """Of all files beside the manifests that are stored at this moment, too: it takes 50 ms for
        100,000."""
        folders = (self._store.root / "fat", self._store.root / "img")
        with store_errors(self._store.root):
            return {name for folder in folders for name in os.listdir(folder)}  # noqa: PTH208 fast

    def needs_of(self, name: str) -> Needs:
        """What a stored manifest needs, itself included; of another file, itself."""
        digest = digest_of(name)
        holder = self._store.manifests.find(digest, use=False) if digest else None
        if holder is None:
            return Needs({name: None})
        look = Look(self._store, strict=True)
        nowhere = Repository("localhost", "any")  # referrers are not looked for
        return self._needs(read_contents(self._store, nowhere, holder.descriptor, look=look))

    def records(self, repository: Repository) -> Iterator[tuple[str, StoredFile]]:
        """The records of the repository's manifests, by the names of those."""
        for name, record in _files(self._store.refs.folder(repository) / "_manifests").items():
            with suppress(DigestInvalid):
                yield file_name(Digest.parse(name)), record

    def _image(
        self, reference: Reference, top: Descriptor, resolved: float | None, look: Look
    ) -> SurveyedImage:
        repository = reference.repository
        contents = read_contents(self._store, repository, top, referrers=True, look=look)
        needs = self._needs(contents)
        ref: StoredFile | None = None
        if reference.tag is not None:
            path = self._store.refs.folder(reference.repository) / "_tags" / reference.tag
            with store_errors(path), suppress(FileNotFoundError):
                ref = StoredFile.of(path, path.stat())
        manifests = [self.manifests[name] for name in needs.manifests if name in self.manifests]
        blobs = [self.blobs[name] for name in needs.blobs if name in self.blobs]
        known = resolved or 0.0
        return SurveyedImage(
            reference,
            top.digest,
            needs,
            ref,
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


def _content(folder: Path) -> dict[str, StoredFile]:
    """What is named as content is; anything else is not this program's to remove."""
    return {name: each for name, each in _files(folder).items() if digest_of(name) is not None}


def _files(folder: Path) -> dict[str, StoredFile]:
    found: dict[str, StoredFile] = {}
    with store_errors(folder), suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                state = entry.stat(follow_symlinks=False)
                found[sys.intern(entry.name)] = StoredFile.of(entry.path, state)
    return dict(sorted(found.items()))
