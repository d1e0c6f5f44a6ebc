"""The walk through the manifests of an image, from its top to the children of its indexes.

The walk does no I/O. Its caller looks up the manifests of one level at a time, in a loop or at
once, and names the children of each to go on with. An image's limits stand here only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest

MAX_DEPTH: Final = 8
"""Levels below the top. Images in use have one or two; a hostile one may have no end."""
MAX_MANIFESTS: Final = 20_000
"""Of one image: as many as one index may list. Each costs a caller a look-up or a request."""
BEYOND_LIMITS: Final = (
    f"nested too deep, or one of too many: an image has up to {MAX_DEPTH} levels "
    f"and {MAX_MANIFESTS} manifests"
)
"""Why a manifest is refused that the walk did not give out."""

Key = tuple["Digest", str, int]
"""A descriptor's digest, media type and size. Two descriptors may describe the same digest in
different ways, of which one is wrong: each is walked."""


def key_of(descriptor: Descriptor) -> Key:
    return descriptor.digest, descriptor.media_type, descriptor.size


class ImageWalk:
    """One walk. While `level` is not empty, look up its manifests and call `advance`."""

    def __init__(self, top: Descriptor) -> None:
        self.level: list[Descriptor] = [top]
        """What to look up next; no descriptor is given out twice."""
        self.reached: dict[Key, Descriptor] = {key_of(top): top}
        """All that was given out or refused, parents first."""
        self.beyond: list[Descriptor] = []
        """Those of `reached` that were refused, for they are beyond the limits."""
        self.children: dict[Key, Sequence[Descriptor]] = {}
        """Of each that was looked up, as the caller named them. A caller may shorten an entry."""
        self.top = top
        self._depth = 0

    def advance(self, children: Iterable[Sequence[Descriptor]]) -> None:
        """Go one level down; `children` has those of each descriptor of `level`, in its order."""
        above, self.level = self.level, []
        self._depth += 1
        for parent, below in zip(above, children, strict=True):
            self.children[key_of(parent)] = below
            for child in below:
                key = key_of(child)
                if key in self.reached:
                    continue
                self.reached[key] = child
                refused = self._depth > MAX_DEPTH or len(self.reached) > MAX_MANIFESTS
                (self.beyond if refused else self.level).append(child)

    def children_first(self) -> Iterator[Descriptor]:
        """All that `children` connects to the top, each after its own children: the order in which
        manifests may be published."""
        # No recursion: levels are counted on the shortest way down, and the longest has no limit.
        entered: set[Key] = set()
        stack = [(self.top, False)]
        while stack:
            descriptor, left = stack.pop()
            key = key_of(descriptor)
            if left:
                yield descriptor
            elif key not in entered:
                entered.add(key)
                stack.append((descriptor, True))
                below = self.children.get(key, ())
                stack.extend((child, False) for child in reversed(below))
