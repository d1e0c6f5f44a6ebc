"""What an image that comes from elsewhere consists of, and why it may not be published.

`store.extract` examines each manifest by itself; `join` adds these parts up to an image.
Tests: tests/store/test_extract.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.oci.image import is_attestation, key_of

if TYPE_CHECKING:
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.image import ImageWalk, Key

_WHOLE: Final = 0
_LACKING: Final = 1
_DAMAGED: Final = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Why content is not usable: it is absent, or it is `damaged`, not what it has to be."""

    descriptor: Descriptor
    what: str
    """manifest, config, layer or blob."""
    reason: str
    damaged: bool = False

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
