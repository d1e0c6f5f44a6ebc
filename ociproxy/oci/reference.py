"""References: registry / repository [:tag] [@digest], parsed and normalised as Docker does.

Grammar: OCI distribution-spec, "Pulling manifests", and `distribution/reference`. Two names more
are allowed: a repository with upper-case letters, which some registries have, and a registry that
is an IPv6 address in brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final

from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.digest import Digest

DOCKER_HUB: Final = "docker.io"
_DOCKER_HUB_ALIASES: Final = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
DEFAULT_TAG: Final = "latest"

_NAME_LIMIT: Final = 255
"""Characters: "many clients impose a limit of 255" (distribution-spec, pulling manifests). File
names, which components become in the store, have the same limit."""
_COMPONENT: Final = r"[A-Za-z0-9]+(?:(?:\.|_|__|-+)[A-Za-z0-9]+)*"
_NAME_PATTERN: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
NO_TAG: Final = "a tag is up to 128 letters, digits, '_', '.' or '-'"
_TAG_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_WILD: Final = frozenset("*?[")
_IMAGE_ID: Final = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_TAG_OF_SUBJECT: Final = re.compile(r"(?P<algorithm>sha256|sha512)-(?P<hex>[a-f0-9]{64,128})")
"""The beginning of a tag that leads to what refers to a digest: the fallback tag of the referrers
API (distribution-spec, referrers tag schema), or one of cosign's with a suffix."""
SIGNATURES: Final = {"sigs": ".sig", "atts": ".att", "sboms": ".sbom"}
"""The kinds that cosign stores under a tag made of the image's digest; the end of that tag."""
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_REGISTRY_PATTERN: Final = re.compile(
    rf"(?:{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]{{2,45}}\])(?::(?P<port>[0-9]{{1,5}}))?"
)
_HTTPS: Final = ":443"
"""What makes a registry of a host without a dot, such as `harbor`, in a reference."""


def parse_registry(text: str) -> str:
    """A registry as `host[:port]` in lower case; `docker.io` for all names of Docker Hub. Raises
    NameInvalid."""
    match = _REGISTRY_PATTERN.fullmatch(text)
    if match is None or len(text) > _NAME_LIMIT:
        raise NameInvalid(text, "a registry is host[:port]")
    port = match["port"]
    if port is not None and not 0 < int(port) < 65536:
        raise NameInvalid(text, "port out of range")
    registry = text.lower()
    host = registry.removesuffix(_HTTPS)
    if not is_registry(host):
        return host  # as `Repository` writes it
    return DOCKER_HUB if registry in _DOCKER_HUB_ALIASES else registry


def is_registry(component: str) -> bool:
    """Whether the first component of a name is a registry, by Docker's rule."""
    return "." in component or ":" in component or component == "localhost"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository in a registry; `name` has one component or more."""

    registry: str
    name: str

    @staticmethod
    def parse(registry: str, name: str) -> Repository:
        """Parse registry and name, into their normal form. On Docker Hub a name of one component
        gets `library/` in front. Raises NameInvalid."""
        return _parse_repository(registry, name)

    def __str__(self) -> str:
        # `harbor/team/app` would be a repository of Docker Hub.
        port = "" if is_registry(self.registry) else _HTTPS
        return f"{self.registry}{port}/{self.name}"


@dataclass(frozen=True, slots=True)
class Reference:
    """A manifest in a repository, by tag, by digest, or by both: then the tag must mean that
    digest."""

    repository: Repository
    tag: str | None = None
    digest: Digest | None = None

    @staticmethod
    def parse(text: str) -> Reference:
        """Parse what a user typed, as `nginx` or `quay.io/a/b:c@sha256:...`.

        Without tag and digest, the tag is `latest`. Raises NameInvalid or DigestInvalid.
        """
        if is_image_id(text):
            raise NameInvalid(text, "the id of an image on one node, which no registry knows")
        rest, at, digest_text = text.partition("@")
        digest = Digest.parse(digest_text) if at else None
        head, slash, last = rest.rpartition("/")
        last, colon, tag = last.partition(":")
        name = f"{head}{slash}{last}"
        if colon:
            check_tag(tag)
        first, slash, remainder = name.partition("/")
        if slash and is_registry(first):
            repository = Repository.parse(first, remainder)
        else:
            repository = Repository.parse(DOCKER_HUB, name)
        if not colon and digest is None:
            tag = DEFAULT_TAG
        return Reference(repository, tag or None, digest)

    @staticmethod
    def of(repository: Repository, text: str) -> Reference:
        """A manifest of this repository by the last part of a request's path: a tag or a digest.
        Raises NameInvalid or DigestInvalid."""
        if ":" in text:
            return Reference(repository, digest=Digest.parse(text))
        check_tag(text)
        return Reference(repository, tag=text)

    def matches(self, pattern: str) -> bool:
        """Whether a user who wrote this pattern means this reference: a glob on the whole of it, or
        a name as in a list of images; without tag and digest all that the repository has."""
        if fnmatchcase(str(self), pattern):
            return True
        try:
            named = Reference.parse(pattern)
        except (NameInvalid, DigestInvalid):
            return False
        if ":" in pattern.rpartition("/")[2] or "@" in pattern:
            return str(named) == str(self)
        return named.repository == self.repository

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"


def is_glob(text: str) -> bool:
    """Whether text is a pattern for references, and no reference: no name has these characters."""
    return not _WILD.isdisjoint(text)


def is_image_id(text: str) -> bool:
    """Whether text is what a container runtime shows for an image without a name: the digest of
    its config, with or without the algorithm."""
    return _IMAGE_ID.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    return _TAG_PATTERN.fullmatch(text) is not None


def check_tag(text: str) -> None:
    """Raises NameInvalid unless text is a tag."""
    if not is_tag(text):
        raise NameInvalid(text, NO_TAG)


@lru_cache(maxsize=4096)
def _parse_repository(registry: str, name: str) -> Repository:
    registry = parse_registry(registry)
    if not _NAME_PATTERN.fullmatch(name):
        raise NameInvalid(
            name,
            "a repository name is components of letters and digits separated by '/', "
            "with single '.', '_', '__' or '-' inside",
        )
    if registry == DOCKER_HUB and "/" not in name:
        name = f"library/{name}"
    if len(name) > _NAME_LIMIT:
        raise NameInvalid(name, f"a repository name has at most {_NAME_LIMIT} characters")
    return Repository(registry, name)


def referrers_tag(subject: Digest) -> str:
    """The tag of the index that lists the referrers of a subject, at a registry without the
    referrers API (distribution-spec, referrers tag schema). Tags of signatures begin with it."""
    return f"{subject.algorithm[:32]}-{subject.encoded[:64]}"


def signature_tags(subject: Digest) -> tuple[str, ...]:
    """The tags that cosign makes of a subject's digest at a registry without the referrers API."""
    return tuple(referrers_tag(subject) + suffix for suffix in SIGNATURES.values())


def subject_prefix(tag: str) -> tuple[str, str] | None:
    """The algorithm and the first hexadecimal digits of the digest in such a tag, or in one of
    cosign's: 64 at most, which are not all of a sha512. None for any other tag."""
    match = _TAG_OF_SUBJECT.match(tag)
    return None if match is None else (match["algorithm"], match["hex"])
