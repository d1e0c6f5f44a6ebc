"""The name under which each image of a source is published: the source's own, or that of `--name`.

`serve --bundle` names images by the same rules; it has no `--name`.
Tests: tests/archive/importer/test_importer.py, tests/archive/test_foreign.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ociproxy.errors import NameInvalid
from ociproxy.oci.reference import DEFAULT_TAG, Reference, Repository, check_tag, subject_prefix

if TYPE_CHECKING:
    from ociproxy.archive.entries import Entries
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
    entries: Entries, given: GivenName | None
) -> tuple[list[tuple[NamedImage, Reference]], list[tuple[NamedImage, str]]]:
    """Images and signatures with their references; and those that cannot be published under any
    name, with the reason.

    Each reference is given once, to the first that has it: a name in the source counts before one
    that is made up of `given`.
    """
    named: list[tuple[NamedImage, Reference]] = []
    nameless: list[tuple[NamedImage, str]] = []
    taken: dict[Reference, Digest] = {}

    def name(image: NamedImage, reference: Reference) -> None:
        digest = image.descriptor.digest
        if reference not in taken:
            taken[reference] = digest
            named.append((image, reference))
        elif taken[reference] != digest:
            reason = f"another image here, {taken[reference]}, is {reference} already"
            nameless.append((image, reason))

    for image in sorted(entries.images, key=lambda each: (each.reference is None, not each.tag)):
        try:
            name(image, image.reference or _given_name(image, given))
        except NameInvalid as exc:
            nameless.append((image, exc.reason if given is None else str(exc)))
    places: dict[Digest, set[Repository]] = {}
    for image, reference in named:
        places.setdefault(image.descriptor.digest, set()).add(reference.repository)
    for each in entries.signatures:
        for repository in sorted(places.get(each.image.descriptor.digest, ()), key=str):
            reference = Reference(repository, each.tag)
            name(replace(each.entry, reference=reference, tag=""), reference)
    return named, nameless


def _given_name(image: NamedImage, given: GivenName | None) -> Reference:
    """Raises NameInvalid, which tells the operator what to do."""
    if given is None:
        what = f"only the tag {image.tag!r}" if image.tag else "no name"
        raise NameInvalid(
            str(image), f"has {what} in the archive; say --name REGISTRY/REPOSITORY[:TAG]"
        )
    tag = given.tag or image.tag or DEFAULT_TAG
    if subject_prefix(image.tag):
        tag = image.tag  # as regctl has signatures in a layout: the tag says of what
    check_tag(tag)
    return Reference(given.repository, tag)
