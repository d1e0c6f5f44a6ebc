"""What an image that comes from elsewhere consists of, and why it may not be published.

`store.extract` examines each manifest by itself; `join` adds these parts up to an image.
Tests: tests/store/test_extract.py.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.errors import IntegrityError
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.image import is_attestation, key_of
from ociproxy.oci.manifest import ManifestHolder, OtherManifest, guess_media_type
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.image import ImageWalk, Key

_WHOLE: Final = 0
_LACKING: Final = 1
_DAMAGED: Final = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Why content is not usable: it is absent; it is wrong (`damaged`); or the store has `no_room`
    for it."""

    descriptor: Descriptor
    what: str
    """manifest, config, layer or blob."""
    reason: str
    damaged: bool = False
    no_room: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.descriptor.digest}: {self.reason}"


@dataclass(slots=True, eq=False)
class Examined:
    """An image, or one manifest of it, as far as it came or the store has it."""

    top: Descriptor
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    """Each after its children."""
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    left_out: list[Descriptor] = field(default_factory=list)
    """What did not come and need not: children of an index, which are other platforms, and layers
    that need not be distributed."""

    @property
    def complete(self) -> bool:
        return not self.problems


def join(walk: ImageWalk, parts: dict[Key, Examined], *, sparse: bool) -> Examined:
    """The image that `walk` walked, of a part for each manifest reached.

    With `sparse`, children that lack something are left out of their index. They are kept, and
    their problems with them, where the index would be left with attestations only. A damaged
    child is always kept. Changes `walk` and `parts`.
    """
    states: dict[Key, int] = {}
    for descriptor in walk.children_first():
        key = key_of(descriptor)
        children = walk.children.get(key, ())
        kept = [each for each in children if not sparse or states[key_of(each)] != _LACKING]
        if all(map(is_attestation, children)) or not all(map(is_attestation, kept)):
            known = set(map(key_of, kept))
            parts[key].left_out += [each for each in children if key_of(each) not in known]
            walk.children[key] = children = kept
        own = (_DAMAGED if each.damaged else _LACKING for each in parts[key].problems)
        states[key] = max((*own, *(states[key_of(each)] for each in children)), default=_WHOLE)
    # Each part once, though several indexes may share it: a hostile image shares without end.
    examined = Examined(walk.top)
    for descriptor in walk.children_first():
        part = parts[key_of(descriptor)]
        examined.manifests.update(part.manifests)
        examined.blobs.update(part.blobs)
        examined.problems += part.problems
        examined.left_out += part.left_out
    return examined


class Unusable(Exception):
    """A manifest cannot be published: it is absent or, where `damaged`, not what it has to be."""

    def __init__(self, reason: str, *, damaged: bool) -> None:
        self.damaged = damaged
        super().__init__(reason)


def check_document(raw: bytes, descriptor: Descriptor) -> ManifestHolder:
    """A parsed manifest under the media type it is described with. Raises Unusable."""
    try:
        own = Descriptor(guess_media_type(raw), descriptor.digest, descriptor.size)
        verified = ManifestHolder.verified(raw, own)
        holder = with_media_type(verified, descriptor)
        misnamed = _is_misnamed(holder, verified)
    except IntegrityError as exc:
        reason = f"expected {exc.quantity} {exc.expected}, got {exc.actual}"
        raise Unusable(reason, damaged=True) from exc
    except MalformedManifest as exc:
        raise Unusable(str(exc), damaged=True) from exc
    if misnamed:
        reason = f"is {own.media_type}, but described as {descriptor.media_type}"
        raise Unusable(reason, damaged=True)
    return holder


def _is_misnamed(described: ManifestHolder, own: ManifestHolder) -> bool:
    """Whether a document with the fields of an image is described by an unknown media type: taken
    for that, it would be complete without its layers. Raises MalformedManifest."""
    if not isinstance(described.manifest, OtherManifest):
        return False
    with suppress(MalformedManifest):
        return not isinstance(own.manifest, OtherManifest)
    return False  # only some of the fields are an image's
