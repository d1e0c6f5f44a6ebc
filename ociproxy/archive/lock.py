"""Locks: which digests a set of references stood for, and everything those digests reach.

A lock pins a load, says what an archive holds, and tells `export --since` what a receiver has. It
is JSON in one canonical form, so that equal locks are equal bytes:

    {"format": "ociproxy-lock/1",
     "images": [{"reference", "digest", "mediaType", "size", "platforms": [...],
                 "complete": true}],
     "contents": [{"digest", "size"}]}

`size` of an image is that of its manifest. An incomplete image has `missing`, the digests it
lacks; one that was flattened has `flattenedFrom`, the digest of the index it was taken from. The
lock of a delta has `base`, the digest of the lock it builds on, and `omitted`, the digests that
the receiver is to have already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, LockInvalid, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT: Final = "ociproxy-lock/1"
LOCK_MAX_SIZE: Final = 64 * 1024 * 1024
"""Bytes: half a million blobs and manifests. Whoever reads a lock reads no more than this."""


@dataclass(frozen=True, slots=True)
class LockedImage:
    """A reference, a tag's or by digest, and the manifest it stood for; platforms are in order."""

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
            "platforms": sorted({str(platform) for platform in self.platforms}),
            "complete": self.complete,
        }
        if self.missing:
            document["missing"] = sorted({str(digest) for digest in self.missing})
        if self.flattened_from is not None:
            document["flattenedFrom"] = str(self.flattened_from)
        return document


@dataclass(frozen=True, slots=True)
class Lock:
    """`contents` is the size in bytes of every manifest and blob that the images reach."""

    images: tuple[LockedImage, ...]
    contents: Mapping[Digest, int] = field(default_factory=dict)
    base: Digest | None = None
    omitted: frozenset[Digest] = frozenset()

    @staticmethod
    def parse(raw: bytes, source: str) -> Lock:
        """Raises LockInvalid, naming the source, for what is no lock."""
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
        """What a delta that builds on this lock calls it."""
        return Digest.of(self.encode())

    def find(self, reference: Reference) -> LockedImage | None:
        return next((each for each in self.images if each.reference == reference), None)


class _Malformed(ValueError):
    """Part of a lock is not what it has to be."""


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
        platforms=tuple(Platform.parse(each) for each in _texts(value, "platforms")),
        complete=complete,
        missing=tuple(_digests(value, "missing")),
        flattened_from=(
            None if flattened_from is None else Digest.parse(_text(flattened_from, "flattenedFrom"))
        ),
    )


def _content(value: object) -> tuple[Digest, int]:
    if not isinstance(value, dict):
        raise _Malformed("an entry of contents is not an object")
    digest, size = Digest.parse(_text(value.get("digest"), "digest")), value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
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
