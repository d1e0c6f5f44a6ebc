"""Locks: the digest that each of a set of references stood for, and the size of all contents.

`load --locked` loads what a lock names, an archive has a lock of its contents, and `export --since`
reads from one what the receiver has. It is JSON in one canonical form, so that equal locks are
equal bytes:

    {"format": "ociproxy-lock/1",
     "images": [{"reference", "digest", "mediaType", "size", "platforms": [...],
                 "complete": true}],
     "contents": [{"digest", "size"}]}

The `size` of an image is that of its manifest, and sizes are in bytes. An incomplete image has
`missing`, the digests it lacks. A flattened image has `flattenedFrom`, the digest of the index it
was taken from. The lock of a delta has `base`, the digest of the lock it builds on, and `omitted`,
the digests that the archive leaves out because the receiver has them.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.errors import DigestInvalid, LockInvalid, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest, is_size
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from io import FileIO
    from pathlib import Path

LOCK_NAME: Final = "ociproxy-lock.json"
"""The member of an archive that is its lock."""
FORMAT: Final = "ociproxy-lock/1"
LOCK_MAX_SIZE: Final = 64 * 1024 * 1024
"""Bytes, of half a million blobs and manifests: it bounds the memory that reading a lock takes."""
_FRONT: Final = 16
"""Members at the front of an archive that are searched for its lock, which is among the first four
where ociproxy wrote the archive."""


@dataclass(frozen=True, slots=True)
class LockedImage:
    """A reference by tag or by digest, and the descriptor of the manifest it stood for. `missing`
    are the digests that an incomplete image lacks."""

    reference: Reference
    descriptor: Descriptor
    platforms: tuple[Platform, ...] = ()
    complete: bool = True
    missing: tuple[Digest, ...] = ()
    flattened_from: Digest | None = None

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {
            "reference": str(self.reference),
            "digest": str(self.descriptor.digest),
            "mediaType": self.descriptor.media_type,
            "size": self.descriptor.size,
            "platforms": sorted(
                {str(platform) for platform in self.platforms if platform.has_name}
            ),
            "complete": self.complete,
        }
        if self.missing:
            document["missing"] = sorted({str(digest) for digest in self.missing})
        if self.flattened_from is not None:
            document["flattenedFrom"] = str(self.flattened_from)
        return document


@dataclass(frozen=True, slots=True)
class Lock:
    """`contents` is the size in bytes of every manifest and blob that the images reach; `omitted`
    are those of them that a delta leaves out."""

    images: tuple[LockedImage, ...]
    contents: Mapping[Digest, int] = field(default_factory=dict)
    base: Digest | None = None
    omitted: frozenset[Digest] = frozenset()

    @staticmethod
    def parse(raw: bytes, source: str) -> Lock:
        """Raises LockInvalid, naming the source, for bytes that are not a lock."""
        if len(raw) > LOCK_MAX_SIZE:
            raise LockInvalid(source, f"is larger than {LOCK_MAX_SIZE} bytes")
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            raise LockInvalid(source, "is not JSON") from exc
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise LockInvalid(source, f'does not say "format": "{FORMAT}"')
        try:
            base = document.get("base")
            return Lock(
                images=tuple(_image(each) for each in _list(document, "images")),
                contents=dict(_content(each) for each in _list(document, "contents")),
                base=None if base is None else Digest.parse(_text(base, "base")),
                omitted=frozenset(_digests(document, "omitted")),
            )
        except (_Malformed, MalformedManifest, NameInvalid, DigestInvalid) as exc:
            raise LockInvalid(source, str(exc)) from exc

    def encode(self) -> bytes:
        """The canonical form: keys and lists in order, ASCII, one newline at the end."""
        document: dict[str, object] = {
            "format": FORMAT,
            "images": sorted(
                (image.to_json() for image in self.images), key=lambda each: str(each["reference"])
            ),
            "contents": [
                {"digest": digest, "size": size}
                for digest, size in sorted((str(d), size) for d, size in self.contents.items())
            ],
        }
        if self.base is not None:
            document["base"] = str(self.base)
        if self.omitted:
            document["omitted"] = sorted(map(str, self.omitted))
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    @property
    def digest(self) -> Digest:
        """The `base` of a delta that builds on this lock."""
        return Digest.of(self.encode())


def read_lock(path: Path) -> Lock:
    """The lock in a lock file, or in an archive of which only the front is read.

    Raises LockInvalid, also for an archive without a lock, or LayoutInvalid for a file that is
    neither of the two.
    """
    with _opened(path) as file:
        head = file.read(1)
    if head in (b"{", b" ", b"\n", b""):
        return read_lock_file(path)
    with _opened(path) as file:
        for member in islice(members(ArchiveStream(file, str(path))), _FRONT):
            if member.name == LOCK_NAME:
                return Lock.parse(member.read(LOCK_MAX_SIZE), f"{path}: {LOCK_NAME}")
    raise LockInvalid(
        str(path), f"has no {LOCK_NAME}: it is no archive of ociproxy's, or not its first volume"
    )


def read_lock_file(path: Path) -> Lock:
    """Raises LockInvalid."""
    with _opened(path) as file:
        return Lock.parse(file.read(LOCK_MAX_SIZE + 1), str(path))


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as exc:
        raise LockInvalid(str(path), f"cannot be read: {exc.strerror or exc}".lower()) from exc
    with file:
        yield file


class _Malformed(ValueError):
    """Part of a lock is not what the format says."""


def _image(value: object) -> LockedImage:
    if not isinstance(value, dict):
        raise _Malformed("an image is not an object")
    reference = Reference.parse(_text(value.get("reference"), "reference of an image"))
    complete = value.get("complete", True)
    if not isinstance(complete, bool):
        raise _Malformed(f"{reference}: complete is neither true nor false")
    flattened_from = value.get("flattenedFrom")
    return LockedImage(
        reference=reference,
        descriptor=Descriptor.from_json(
            {key: value.get(key) for key in ("mediaType", "digest", "size")}
        ),
        platforms=_platforms(value),
        complete=complete,
        missing=tuple(_digests(value, "missing")),
        flattened_from=(
            None if flattened_from is None else Digest.parse(_text(flattened_from, "flattenedFrom"))
        ),
    )


def _platforms(value: dict[str, object]) -> tuple[Platform, ...]:
    """Without what is no platform: such a text hides no image from the reader of a lock."""
    found = []
    for text in _texts(value, "platforms"):
        with suppress(NameInvalid):
            found.append(Platform.parse(text))
    return tuple(found)


def _content(value: object) -> tuple[Digest, int]:
    if not isinstance(value, dict):
        raise _Malformed("an entry of contents is not an object")
    digest, size = Digest.parse(_text(value.get("digest"), "digest")), value.get("size")
    if not is_size(size):
        raise _Malformed(f"contents {digest}: size is not a count of bytes")
    return digest, size


def _digests(document: dict[str, object], key: str) -> Iterable[Digest]:
    return (Digest.parse(each) for each in _texts(document, key))


def _texts(document: dict[str, object], key: str) -> list[str]:
    return [_text(each, key) for each in _list(document, key)]


def _list(document: dict[str, object], key: str) -> list[object]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise _Malformed(f"{key} is not a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"{what} is not text")
    return value
