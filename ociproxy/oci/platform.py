"""Platforms: one spelling for each, and the children of an index that are chosen for them.

The spelling is containerd's (platforms/database.go). So a user who asks for `aarch64` or `arm64/v8`
gets the child that an index calls `arm64`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.errors import NameInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.manifest import Index

_ARCHITECTURES: Final = {
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    **dict.fromkeys(("i386", "i486", "i586", "i686"), ("386", "")),
}
_SYSTEMS: Final = {"macos": "darwin"}
_DEFAULT_VARIANTS: Final = {"amd64": "v1", "arm64": "v8"}
"""Variants that the normal form leaves out, for these architectures mean them anyway. For `arm` it
always names one, `v7` if none was given."""
_DOWNWARD: Final = frozenset({"amd64", "arm"})
"""Architectures whose higher variants run the images of lower ones."""

_PART: Final = re.compile(r"[A-Za-z0-9_.-]+")
_UNKNOWN: Final = "unknown"
_ATTESTATION: Final = "vnd.docker.reference.digest"
"""Annotation of an attestation by BuildKit: the digest of the image that it is about."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, architecture and variant; printed `os/architecture[/variant]`."""

    os: str
    architecture: str
    variant: str = ""

    @staticmethod
    def parse(text: str) -> Platform:
        """Parse what a user typed, into the normal form. Raises NameInvalid."""
        parts = text.strip().split("/")
        if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
            raise NameInvalid(text, "a platform is os/architecture[/variant]")
        return Platform(*parts).normalised()

    def normalised(self) -> Platform:
        """The normal form: the same for all spellings of one platform."""
        system = self.os.lower()
        architecture, variant = self.architecture.lower(), self.variant.lower()
        if architecture in _ARCHITECTURES:
            architecture, implied = _ARCHITECTURES[architecture]
            variant = variant or implied
        if variant.isdecimal():
            variant = f"v{variant}"
        if architecture == "arm":
            variant = variant or "v7"
        elif variant == _DEFAULT_VARIANTS.get(architecture):
            variant = ""
        return Platform(_SYSTEMS.get(system, system), architecture, variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def choose(
    index: Index, platforms: Sequence[Platform], *, attestations: bool = False
) -> tuple[Descriptor, ...]:
    """The children of an index for these platforms, in the index's order. Without platforms, all
    children, attestations included.

    An index may have no child for the wanted variant. Then the highest lower variant is taken that
    the wanted one runs, as containerd does: `linux/arm/v7` gets `linux/arm/v6`. A child without a
    platform fits every platform, for an index of indexes names platforms further down.
    `attestations` adds BuildKit's attestations of the chosen children.
    """
    if not platforms:
        return index.manifests
    children = [
        (child, child.platform and child.platform.normalised()) for child in index.manifests
    ]
    images = [(child, place) for child, place in children if not is_attestation(child)]
    offered = {place for _, place in images if place is not None}
    taken = {_best(platform.normalised(), offered) for platform in platforms} | {None}
    chosen = {id(child) for child, place in images if place in taken}
    if attestations:
        subjects = {str(child.digest) for child, _ in images if id(child) in chosen}
        chosen |= {
            id(child)
            for child in index.manifests
            if is_attestation(child) and dict(child.annotations).get(_ATTESTATION) in subjects
        }
    return tuple(child for child in index.manifests if id(child) in chosen)


def is_attestation(child: Descriptor) -> bool:
    """Whether a child of an index is an attestation by BuildKit, and no image."""
    if any(key == _ATTESTATION for key, _ in child.annotations):
        return True
    platform = child.platform
    return platform is not None and platform.os == platform.architecture == _UNKNOWN


def _best(wanted: Platform, offered: set[Platform]) -> Platform:
    if wanted in offered or wanted.architecture not in _DOWNWARD:
        return wanted
    same = (place for place in offered if replace(place, variant=wanted.variant) == wanted)
    lower = [place for place in same if _rank(place) < _rank(wanted)]
    return max(lower, key=_rank, default=wanted)


def _rank(platform: Platform) -> int:
    number = platform.variant.removeprefix("v")
    return int(number) if number.isdecimal() and len(number) < 4 else 1 if not number else 0
