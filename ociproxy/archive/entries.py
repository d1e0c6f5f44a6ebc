"""What each entry of an `index.json` is: an image, a part of one, or what signs or describes one.

The image-spec leaves that open, and tools write it in several ways. oras lists the children of an
index beside it, without a name. hauler gives signatures and referrers the name of their image, and
cosign gives no name at all; both say in the annotation `kind` what an entry is. `import` and
`serve --bundle` read them by the same rules, which are here.

Tests: tests/archive/test_foreign.py, tests/archive/importer/test_importer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ociproxy.oci.descriptor import is_generic
from ociproxy.oci.manifest import Index
from ociproxy.oci.reference import SIGNATURES, Reference, referrers_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.layout import NamedImage
    from ociproxy.oci.manifest import Manifest

    Find = Callable[[Descriptor], Manifest | None]

_REFERRERS: Final = "referrers"


@dataclass(frozen=True, slots=True)
class Signature:
    """An entry that belongs in the repository of an image, under a tag that cosign looks for."""

    entry: NamedImage
    image: NamedImage
    tag: str


@dataclass(slots=True)
class Entries:
    """`images` have names of their own, or need one; `refused` have a `problem`. A referrer stands
    with the digest of its subject, and goes where that is."""

    refused: list[NamedImage] = field(default_factory=list)
    images: list[NamedImage] = field(default_factory=list)
    signatures: list[Signature] = field(default_factory=list)
    referrers: list[tuple[NamedImage, Digest]] = field(default_factory=list)


def sort_entries(listed: Sequence[NamedImage], find: Find) -> Entries:
    """`find` returns the manifest of a descriptor; None where it is not there or not readable."""
    entries = Entries()
    groups: dict[Reference | str, list[NamedImage]] = {}
    for each in listed:
        if each.problem:
            entries.refused.append(each)
        else:
            groups.setdefault(each.reference or each.tag, []).append(each)
    named = {each.descriptor.digest for each in listed if each.reference is not None}
    parts: set[Digest] | None = None
    for key, group in groups.items():
        images = _without_artifacts(group, find, entries, shared=key == "")
        if not isinstance(key, Reference):
            # A manifest that has a full name needs no second one.
            images = [each for each in images if each.descriptor.digest not in named]
        if images and key == "":
            parts = _parts(listed, find) if parts is None else parts
            images = [each for each in images if each.descriptor.digest not in parts]
        entries.images += images
        _sign(group, images, entries)
    return entries


def _without_artifacts(
    group: list[NamedImage], find: Find, entries: Entries, *, shared: bool
) -> list[NamedImage]:
    """The images of a group that has one name, or no name; its referrers go into `entries`. Where
    the name is not `shared`, an artifact may have it, too."""
    if not shared and len({each.descriptor.digest for each in group}) < 2:
        return group
    images = []
    for each in group:
        if each.kind in SIGNATURES:
            continue
        manifest = find(each.descriptor)
        if manifest is not None and manifest.subject is not None:
            entries.referrers.append((each, manifest.subject.digest))
        elif each.kind.partition("/")[0] == _REFERRERS:
            entries.refused.append(
                _refused(each, "its manifest is not readable, or has no subject")
            )
        else:
            images.append(each)
    return images


def _sign(group: list[NamedImage], images: list[NamedImage], entries: Entries) -> None:
    """Add the signatures of a group; an image has the group's name but for one that has not."""
    taken = set(map(id, images))
    signed = {each.descriptor.digest: each for each in images}
    for each in group:
        if each.kind not in SIGNATURES or id(each) in taken:
            continue
        if len(signed) == 1:
            [(digest, image)] = signed.items()
            tag = referrers_tag(digest) + SIGNATURES[each.kind]
            entries.signatures.append(Signature(each, image, tag))
        else:
            reason = f"the archive does not say of which of {len(signed)} images"
            entries.refused.append(_refused(each, reason))


def _refused(entry: NamedImage, reason: str) -> NamedImage:
    return replace(entry, reference=None, problem=f"{entry} is of kind {entry.kind}: {reason}")


def _parts(listed: Iterable[NamedImage], find: Find) -> set[Digest]:
    """The digests of what the indexes of all entries lead to."""
    # One walk for all entries: each index is read once, however many lead to it.
    waiting = [each.descriptor for each in listed]
    entered: set[Digest] = set()
    below: set[Digest] = set()
    while waiting:
        descriptor = waiting.pop()
        # Blobs are not read: an index may have any number of them among its children.
        if descriptor.digest in entered or not (
            descriptor.is_index or is_generic(descriptor.media_type)
        ):
            continue
        entered.add(descriptor.digest)
        manifest = find(descriptor)
        if isinstance(manifest, Index):
            below.update(child.digest for child in manifest.manifests)
            waiting += manifest.children
    return below
