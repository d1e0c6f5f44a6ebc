"""Image lists: what to load, one reference a line.

    # a comment
    nginx
    quay.io/team/app:v1@sha256:...   platform=linux/amd64,linux/arm64   # another comment

A list is read to its end, and every problem in it is reported with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ociproxy.errors import ConfigError, DigestInvalid, NameInvalid, shorten
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference

SIZE_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of one list: more than a hundred thousand references."""

_COMMENT: Final = re.compile(r"(?:^|\s)#.*")
_PLATFORM: Final = "platform="
_ALL: Final = "all"
_KUBERNETES: Final = re.compile(r"^apiVersion:", re.MULTILINE)
_SCHEMES: Final = ("docker://", "https://", "http://", "oci://")

ALL_PLATFORMS: Final[tuple[Platform, ...]] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to load, named at `place`, which is `source:line`.

    Empty `platforms` mean all. If `strict`, the image must have each of them, else at least one.
    If `pinned`, the digest comes from a lock, and the upstream is not asked what the tag means.
    """

    reference: Reference
    platforms: tuple[Platform, ...] = ALL_PLATFORMS
    place: str = ""
    strict: bool = False
    pinned: bool = False

    def refuses(self, lacking: tuple[Platform, ...]) -> bool:
        """Whether an image that an index offers is of no use without these platforms."""
        return bool(lacking) and (self.strict or lacking == self.platforms)

    def __str__(self) -> str:
        """As a line of a list."""
        platforms = ",".join(map(str, self.platforms)) if self.platforms else _ALL
        return f"{self.reference} {_PLATFORM}{platforms}"


class ImageListInvalid(ConfigError):
    """Every problem of the lists, a line each; the attributes are those of the first problem."""

    def __init__(self, problems: Iterable[ConfigError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.reason, file=first.file, line=first.line)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def parse_list(
    text: str, source: str, *, platforms: tuple[Platform, ...] = ALL_PLATFORMS
) -> tuple[list[Wanted], list[ConfigError]]:
    """The images of the list, and its problems. `platforms` are for lines that name none. Of a file
    of another kind that is known, this is the one problem."""
    wanted: list[Wanted] = []
    problems: list[ConfigError] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = _COMMENT.sub("", line).split()
        if not words:
            continue
        try:
            own = _own_platforms(words[1:])
            wanted.append(
                Wanted(
                    parse_reference(words[0]),
                    platforms if own is None else own,
                    f"{source}:{number}",
                    strict=own is not None,
                )
            )
        except (NameInvalid, DigestInvalid, ValueError) as error:
            problems.append(ConfigError(str(error), file=source, line=number))
    if problems and _KUBERNETES.search(text):
        reason = "is a Kubernetes manifest: give it with --kubernetes, or list the images in it"
        problems = [ConfigError(reason, file=source)]
    return wanted, problems


def parse_reference(text: str) -> Reference:
    """A reference without a scheme such as docker://. Raises NameInvalid or DigestInvalid."""
    for scheme in _SCHEMES:
        if text.startswith(scheme):
            raise NameInvalid(text, f"write it without {scheme}")
    return Reference.parse(text)


def merged(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Each reference once, in the order of the lists, with the platforms of all its lines."""
    unique: dict[Reference, Wanted] = {}
    for each in wanted:
        known = unique.get(each.reference)
        unique[each.reference] = each if known is None else _union(known, each)
    return list(unique.values())


def pinned(
    wanted: Iterable[Wanted], locked: Mapping[Reference, Reference]
) -> tuple[list[Wanted], list[ConfigError]]:
    """The images with the digests of a lock, and the problems: images that the lock lacks, or has
    another digest for. `locked` maps references, by tag if they have one, to those with digests."""
    found: list[Wanted] = []
    problems: list[ConfigError] = []
    for each in wanted:
        reference = each.reference
        by_tag = replace(reference, digest=None) if reference.tag else reference
        pair = locked.get(reference) or locked.get(by_tag)
        if pair is None and reference.tag is None:
            pair = reference  # a digest needs no lock
        if pair is None:
            reason = f"{reference} is not in the lock"
        elif reference.digest not in (None, pair.digest):
            reason = f"{reference}: the lock has {pair.digest}"
        else:
            found.append(replace(each, reference=pair, pinned=True))
            continue
        problems.append(ConfigError(f"{each.place}: {reason}"))
    return found, problems


def _own_platforms(words: list[str]) -> tuple[Platform, ...] | None:
    """The platforms of `platform=...`, None without it. Raises NameInvalid or ValueError."""
    found: tuple[Platform, ...] | None = None
    for word in words:
        if not word.startswith(_PLATFORM):
            raise ValueError(f"after the reference may stand {_PLATFORM}..., not {shorten(word)}")
        if found is not None:
            raise ValueError(f"{_PLATFORM} stands there twice")
        value = word.removeprefix(_PLATFORM)
        found = ALL_PLATFORMS if value == _ALL else parse_platforms(value)
    return found


def parse_platforms(text: str) -> tuple[Platform, ...]:
    """Parse `linux/amd64,linux/arm64`; each platform once. Raises NameInvalid."""
    return tuple(dict.fromkeys(Platform.parse(part) for part in text.split(",")))


def _union(first: Wanted, second: Wanted) -> Wanted:
    platforms = ALL_PLATFORMS
    if first.platforms and second.platforms:
        platforms = tuple(dict.fromkeys((*first.platforms, *second.platforms)))
    return replace(first, platforms=platforms, strict=first.strict or second.strict)
