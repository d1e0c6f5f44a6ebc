"""What the images of a source are called: by the source, or by whoever imports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.errors import NameInvalid
from ociproxy.oci.reference import DEFAULT_TAG, Reference, Repository, check_tag

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ociproxy.oci.digest import Digest
    from ociproxy.oci.layout import NamedImage


@dataclass(frozen=True, slots=True)
class GivenName:
    """What to call images that have no full name; without a tag they keep the one they have."""

    repository: Repository
    tag: str | None = None

    @staticmethod
    def parse(text: str) -> GivenName:
        """Raises NameInvalid, DigestInvalid."""
        reference = Reference.parse(text)
        if reference.digest is not None:
            raise NameInvalid(text, "give REGISTRY/REPOSITORY or REGISTRY/REPOSITORY:TAG")
        has_tag = ":" in text.rpartition("/")[2]
        return GivenName(reference.repository, reference.tag if has_tag else None)


@dataclass(frozen=True, slots=True)
class Nameless:
    """An image that cannot be published under any name; `reason` says what to do."""

    image: NamedImage
    reason: str


def name_all(
    images: Iterable[NamedImage], given: GivenName | None
) -> tuple[list[tuple[NamedImage, Reference]], list[Nameless]]:
    """Each image with its reference, once; and those that have none."""
    named: list[tuple[NamedImage, Reference]] = []
    nameless: list[Nameless] = []
    taken: dict[Reference, Digest] = {}
    for image in images:
        try:
            reference = image.reference or _given_name(image, given)
        except NameInvalid as exc:
            nameless.append(Nameless(image, exc.reason if given is None else str(exc)))
            continue
        digest = image.descriptor.digest
        if reference not in taken:
            taken[reference] = digest
            named.append((image, reference))
        elif taken[reference] != digest:
            reason = f"another image here, {taken[reference]}, is {reference} already"
            nameless.append(Nameless(image, reason))
    return named, nameless


def _given_name(image: NamedImage, given: GivenName | None) -> Reference:
    """Raises NameInvalid, saying what to do."""
    if given is None:
        what = f"only the tag {image.tag!r}" if image.tag else "no name"
        raise NameInvalid(
            str(image), f"has {what} in the archive; say --name REGISTRY/REPOSITORY[:TAG]"
        )
    tag = given.tag or image.tag or DEFAULT_TAG
    check_tag(tag)
    return Reference(given.repository, tag)
