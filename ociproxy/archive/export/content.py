"""What an archive holds: its small documents, and its content in the order of the archive.

Both depend on the chosen images only, not on clock, host, or the order in which the store was
filled: the same images make the same bytes at any time, on any host.
Tests: tests/archive/export/test_export.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.archive.lock import Lock, LockedImage
from ociproxy.errors import ManifestUnknown
from ociproxy.oci.descriptor import IMAGE_CONFIGS, OCI_INDEX
from ociproxy.oci.layout import IMAGE_NAME, MARKER, REF_NAME, VERSION, VERSION_KEY, blob_path
from ociproxy.oci.layout import INDEX as INDEX_NAME
from ociproxy.oci.manifest import ImageManifest
from ociproxy.oci.reference import Reference
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.archive.export.selection import Chosen
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.store.store import Store

DOCKER_NAME: Final = "manifest.json"
SUBJECT: Final = "io.containerd.manifest.subject"
"""containerd's annotation of an entry of index.json that is a referrer: its subject's digest."""


_TOP_INDEX, _INDEX, _MANIFEST, _CONFIG, _LAYER = range(5)


@dataclass(frozen=True, slots=True)
class Document:
    """A small file of the archive beside its content."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Content:
    """A manifest or a blob of `size` bytes. An archive is in the order of `rank`, parents before
    their children, so that a reader needs one pass; digests of one rank are in order."""

    digest: Digest
    size: int
    rank: int

    @property
    def is_manifest(self) -> bool:
        return self.rank <= _MANIFEST

    @property
    def name(self) -> str:
        return blob_path(self.digest)


def contents(chosen: Sequence[Chosen]) -> list[Content]:
    """All that the images reach, each digest once, in the order of the archive."""
    found: dict[Digest, Content] = {}
    for image in chosen:
        reached = image.contents
        for digest, descriptor in reached.manifests.items():
            rank = _MANIFEST
            if descriptor.is_index:
                rank = _TOP_INDEX if digest == reached.top.digest else _INDEX
            _keep_lowest(found, Content(digest, descriptor.size, rank))
        for digest, size in reached.blobs.items():
            rank = _CONFIG if digest in reached.configs else _LAYER
            _keep_lowest(found, Content(digest, size, rank))
    return sorted(found.values(), key=lambda each: (each.rank, str(each.digest)))


def lock_of(chosen: Sequence[Chosen], held: Sequence[Content]) -> Lock:
    """The lock of these images. `held` is their whole content, for a delta too."""
    images = tuple(
        LockedImage(
            reference=each.reference,
            descriptor=_described(each),
            platforms=each.contents.platforms,
            complete=each.contents.complete,
            missing=tuple(each.contents.missing),
            flattened_from=each.flattened_from,
        )
        for each in chosen
    )
    return Lock(images, {content.digest: content.size for content in held})


def marker() -> Document:
    return Document(MARKER, _canonical({VERSION_KEY: VERSION}))


def index(chosen: Sequence[Chosen], *, digest_names: bool) -> Document:
    """`index.json`: an entry for each name, with the name in both annotations.

    A referrer has an entry without a name; an importer finds its image by the subject.
    """
    entries: list[dict[str, object]] = []
    nameless: dict[Digest, dict[str, object]] = {}
    for each in chosen:
        descriptor = _described(each)
        entries.append(_entry(descriptor, each.reference))
        by_digest = Reference(each.reference.repository, digest=descriptor.digest)
        if digest_names and each.reference.tag is not None:
            entries.append(_entry(descriptor, by_digest))
        for digest, referrer in each.contents.referrers.items():
            nameless[digest] = _json(referrer.descriptor, {SUBJECT: str(referrer.subject)})
    unique = {_canonical(entry): entry for entry in (*entries, *nameless.values())}
    ordered = sorted(unique.items(), key=lambda pair: (SUBJECT in str(pair[1]), pair[0]))
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [entry for _, entry in ordered],
    }
    return Document(INDEX_NAME, _canonical(document))


def docker_manifest(store: Store, chosen: Sequence[Chosen]) -> Document | None:
    """`manifest.json`, which `docker load` reads where it does not know index.json.

    None where an image is incomplete, or no container can be started from it. Raises
    ManifestUnknown.
    """
    entries: dict[Digest, dict[str, object]] = {}
    names: dict[Digest, list[str]] = {}
    for each in chosen:
        if not each.contents.complete:
            return None
        image = _manifest(store, each.contents.top).manifest
        if not isinstance(image, ImageManifest) or image.config.media_type not in IMAGE_CONFIGS:
            return None
        digest = each.contents.top.digest
        entries[digest] = {
            "Config": blob_path(image.config.digest),
            "Layers": [blob_path(layer.digest) for layer in image.layers],
        }
        if each.reference.tag is not None:
            names.setdefault(digest, []).append(str(each.reference))
    document = [
        {**entry, "RepoTags": sorted(names.get(digest, []))}
        for digest, entry in sorted(entries.items(), key=lambda pair: str(pair[0]))
    ]
    return Document(DOCKER_NAME, _canonical(document))


def read_manifest(store: Store, digest: Digest) -> bytes:
    """The verified bytes. Raises ManifestUnknown where they have gone or been damaged since."""
    found = store.manifests.find(digest, use=False)
    if found is None:
        raise ManifestUnknown(digest, "is gone from the store or damaged; load the image again")
    return found.raw


def _manifest(store: Store, descriptor: Descriptor) -> ManifestHolder:
    found = store.manifests.find(descriptor.digest, use=False)
    if found is None:
        raise ManifestUnknown(descriptor.digest, "is gone from the store; load the image again")
    return with_media_type(found, descriptor)


def _keep_lowest(found: dict[Digest, Content], content: Content) -> None:
    known = found.get(content.digest)
    if known is None or content.rank < known.rank:
        found[content.digest] = content


def _described(chosen: Chosen) -> Descriptor:
    """The descriptor of the image's top, with the media type that its upstream gave."""
    top = chosen.contents.top
    stored = chosen.contents.manifests.get(top.digest, top)
    return stored if chosen.flattened_from is None else stored._replace(platform=top.platform)


def _entry(descriptor: Descriptor, reference: Reference) -> dict[str, object]:
    name = str(reference)
    return _json(descriptor, {IMAGE_NAME: name, REF_NAME: name})


def _json(descriptor: Descriptor, annotations: dict[str, str]) -> dict[str, object]:
    return descriptor._replace(annotations=tuple(annotations.items())).to_json()


def _canonical(document: object) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
