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

_PART: Final = r"[A-Za-z0-9_.+-]+"
"""The `+` is in variants of arm64, as `v8.2+sve`."""
_TEXT: Final = re.compile(
    rf"(?P<os>{_PART})(?:\((?P<inner>{_PART})\))?/(?P<architecture>{_PART})"
    rf"(?:/(?P<variant>{_PART}))?(?::(?P<version>{_PART}))?"
)


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, architecture, variant and version of the operating system, which tells
    Windows images apart. Printed `os/architecture[/variant][:version]`, as crane has it."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @staticmethod
    def parse(text: str) -> Platform:
        """Parse what a user typed, into the normal form; containerd's `os(version)/architecture` is
        understood, too. Raises NameInvalid."""
        platform = _read(text.strip())
        if platform is None:
            raise NameInvalid(text, "a platform is os/architecture[/variant][:version]")
        return platform.normalised()

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
        return Platform(_SYSTEMS.get(system, system), architecture, variant, self.os_version)

    def runs_on(self, version: str) -> bool:
        """Whether an image of this platform is for a version of the operating system, of which the
        last numbers may be left out; an empty one stands for all."""
        return not version or f"{self.os_version}.".startswith(f"{version}.")

    @property
    def has_name(self) -> bool:
        """Whether `parse` reads what this prints. A document may hold any text as a platform."""
        return _read(str(self)) == self

    def __str__(self) -> str:
        name = "/".join(part for part in (self.os, self.architecture, self.variant) if part)
        return f"{name}:{self.os_version}" if self.os_version else name


def _read(text: str) -> Platform | None:
    match = _TEXT.fullmatch(text)
    if match is None or (match["inner"] and match["version"]):
        return None
    version = match["inner"] or match["version"] or ""
    return Platform(match["os"], match["architecture"], match["variant"] or "", version)
