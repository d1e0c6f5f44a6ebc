"""The name under which each image of a source is published: the source's own, or that of `--name`.

Tests: tests/archive/importer/test_importer.py.
"""

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
    """The `--name` for images that have no full name; without a tag they keep their own tag."""

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


def name_all(
    images: Iterable[NamedImage], given: GivenName | None
) -> tuple[list[tuple[NamedImage, Reference]], list[tuple[NamedImage, str]]]:
    """Images with their references, each reference once; and images that cannot be published under
    any name, with the reason."""
    named: list[tuple[NamedImage, Reference]] = []
    nameless: list[tuple[NamedImage, str]] = []
    taken: dict[Reference, Digest] = {}
    for image in images:
        try:
            reference = image.reference or _given_name(image, given)
        except NameInvalid as exc:
            nameless.append((image, exc.reason if given is None else str(exc)))
            continue
        digest = image.descriptor.digest
        if reference not in taken:
            taken[reference] = digest
            named.append((image, reference))
        elif taken[reference] != digest:
            reason = f"another image here, {taken[reference]}, is {reference} already"
            nameless.append((image, reason))
    return named, nameless


def _given_name(image: NamedImage, given: GivenName | None) -> Reference:
    """Raises NameInvalid, which tells the operator what to do."""
    if given is None:
        what = f"only the tag {image.tag!r}" if image.tag else "no name"
        raise NameInvalid(
            str(image), f"has {what} in the archive; say --name REGISTRY/REPOSITORY[:TAG]"
        )
    tag = given.tag or image.tag or DEFAULT_TAG
    check_tag(tag)
    return Reference(given.repository, tag)
