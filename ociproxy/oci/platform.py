"""Platforms: one spelling for each, and the children of an index that are chosen for them.

The spelling is containerd's (platforms/database.go). So a user who asks for `aarch64` or `arm64/v8`
gets the child that an index calls `arm64`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ociproxy.errors import NameInvalid

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

_PART: Final = re.compile(r"[A-Za-z0-9_.+-]+")
"""The `+` is in variants of arm64, as `v8.2+sve`."""


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

    @property
    def has_name(self) -> bool:
        """Whether `parse` reads what this prints. A document may hold any text as a platform."""
        parts = (self.os, self.architecture, *((self.variant,) if self.variant else ()))
        return all(_PART.fullmatch(part) for part in parts)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
