"""The walk through the manifests of an image, and which children of an index are chosen.

The walk does no I/O. Its caller looks up the manifests of one level at a time, in a loop or at
once, and names the children of each to go on with. An image's limits stand here only.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ociproxy.oci.descriptor import MalformedManifest, platform_in
from ociproxy.oci.manifest import json_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ImageManifest, Index
    from ociproxy.oci.platform import Platform

MAX_DEPTH: Final = 8
"""Levels below the top. Images in use have one or two; a hostile one may have no end."""
MAX_MANIFESTS: Final = 20_000
"""Of one image: as many as one index may list. Each costs a caller a look-up or a request."""
BEYOND_LIMITS: Final = (
    f"nested too deep, or one of too many: an image has up to {MAX_DEPTH} levels "
    f"and {MAX_MANIFESTS} manifests"
)
"""Why a manifest is refused that the walk did not give out."""

_DOWNWARD: Final = frozenset({"amd64", "arm"})
"""Architectures whose higher variants run the images of lower ones."""
_UNKNOWN: Final = "unknown"
_ATTESTATION: Final = "vnd.docker.reference.digest"
"""Annotation of an attestation by BuildKit: the digest of the image that it is about."""

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


def choose(
    index: Index, platforms: Sequence[Platform], *, attestations: bool = False
) -> tuple[Descriptor, ...]:
    """The children of an index for these platforms, in the index's order. Without platforms, all
    children, attestations included. Entries that are blobs are no children.

    An index may have no child for the wanted variant. Then the highest lower variant is taken that
    the wanted one runs, as containerd does: `linux/arm/v7` gets `linux/arm/v6`. A child without a
    platform fits every platform, for an index of indexes names platforms further down. A wanted
    platform without a version of the operating system gets the children for all of them.
    `attestations` adds BuildKit's attestations of the chosen children.
    """
    if not platforms:
        return index.children
    children = [(child, child.platform and child.platform.normalised()) for child in index.children]
    images = [(child, place) for child, place in children if not is_attestation(child)]
    offered = {_any_version(place) for _, place in images if place is not None}
    wanted = [(_best(_any_version(each.normalised()), offered), each) for each in platforms]
    chosen = {
        id(child)
        for child, place in images
        if place is None
        or any(_any_version(place) == best and place.runs_on(e.os_version) for best, e in wanted)
    }
    if attestations:
        subjects = {str(child.digest) for child, _ in images if id(child) in chosen}
        chosen |= {
            id(child)
            for child in index.children
            if is_attestation(child) and attested(child) in subjects
        }
    return tuple(child for child in index.children if id(child) in chosen)


def platform_of(config: bytes) -> Platform | None:
    """The platform that the config of an image names (image-spec config.md), if it names one."""
    with suppress(MalformedManifest):
        return platform_in(json_object(config))
    return None


def platforms_of(places: Iterable[Platform | None]) -> tuple[Platform, ...]:
    """The platforms that an image is said to have: normalised, each once, in alphabetical order;
    without the `unknown/unknown` of attestations."""
    named = {place.normalised() for place in places if place and place.os != _UNKNOWN}
    return tuple(sorted(named, key=str))


def lacking_in(index: Index, platforms: Sequence[Platform]) -> tuple[Platform, ...]:
    """Those of the platforms for which the index has no child."""
    return tuple(each for each in platforms if not choose(index, (each,)))


def is_attestation(child: Descriptor) -> bool:
    """Whether a child of an index is an attestation by BuildKit, and no image."""
    if any(key == _ATTESTATION for key, _ in child.annotations):
        return True
    platform = child.platform
    return platform is not None and platform.os == platform.architecture == _UNKNOWN


def attested(child: Descriptor) -> str | None:
    """The digest of the image that an attestation by BuildKit names, as it stands there."""
    return dict(child.annotations).get(_ATTESTATION)


def lost_layers(manifest: ImageManifest, config: bytes) -> int:
    """The number of layers that the config of an image names, where the manifest names none.

    Docker 25.0 saved such manifests. Without layers such an image would count as whole.
    """
    if manifest.layers:
        return 0
    try:
        rootfs = json_object(config).get("rootfs")
    except MalformedManifest:
        return 0
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    return len(diff_ids) if isinstance(diff_ids, list) else 0


def _any_version(platform: Platform) -> Platform:
    return replace(platform, os_version="")


def _best(wanted: Platform, offered: set[Platform]) -> Platform:
    if wanted in offered or wanted.architecture not in _DOWNWARD:
        return wanted
    same = (place for place in offered if replace(place, variant=wanted.variant) == wanted)
    lower = [place for place in same if _rank(place) < _rank(wanted)]
    return max(lower, key=_rank, default=wanted)


def _rank(platform: Platform) -> int:
    number = platform.variant.removeprefix("v")
    return int(number) if number.isdecimal() and len(number) < 4 else 1 if not number else 0
