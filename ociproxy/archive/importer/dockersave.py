"""`docker save` archives: their `manifest.json` names configs, tags and layers, but no manifests.

The archive lacks the manifest that the registry has, so this module makes an OCI manifest of the
config and the layers as they are. It is the same for the same archive, and its digest is not the
registry's. Format: moby's image specification v1.2, "Combined Image JSON + Filesystem Changeset
Format".
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.decompress import GZIP, ZSTD
from ociproxy.archive.importer.results import unreadable
from ociproxy.errors import DigestInvalid, LayoutInvalid, NameInvalid, shorten
from ociproxy.oci.descriptor import OCI_MANIFEST, Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import NO_TAG, NamedImage, parse_blob_path
from ociproxy.oci.manifest import json_object
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from ociproxy.store.extract import Extractor

_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_PACKED: Final = {GZIP: "+gzip", ZSTD: "+zstd"}
_MAX_LINKS: Final = 8
"""Links that are followed from one name to the next; a circle must end."""
_MAX_LAYERS: Final = 1000
"""Layers of an image; Docker itself stops at 125."""
SKOPEO_DIR: Final = (
    "is what skopeo writes as dir:, which names no image; make an archive of it: "
    "skopeo copy dir:FOLDER oci-archive:FILE:REGISTRY/REPOSITORY:TAG"
)
_IMGPKG: Final = frozenset({"Image", "ImageIndex"})
"""Keys of an entry of the `manifest.json` that imgpkg writes."""
_NOTE: Final = (
    "docker save keeps no manifests: they are made anew, so digests differ from the registry's"
)


@dataclass(slots=True)
class SavedFiles:
    """The files of the archive, by name the digest of each, and its links with their targets."""

    digests: dict[str, Digest] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def add_link(self, name: str, target: str) -> None:
        self.links[name] = posixpath.normpath(
            posixpath.join("/", posixpath.dirname(name), target)
        ).lstrip("/")

    def find(self, name: str) -> Digest | None:
        """The digest of a file, which may be a link to another file of the archive."""
        for _ in range(_MAX_LINKS):
            digest = self.digests.get(name) or parse_blob_path(name)
            if digest is not None:
                return digest
            if name not in self.links:
                return None
            name = self.links[name]
        return None


def saved_images(
    raw: bytes, saved: SavedFiles, extractor: Extractor, source: str
) -> tuple[list[NamedImage], list[str]]:
    """The images that a `manifest.json` names, with manifests made for them, and notes for the
    operator. An image that cannot be made is `unreadable`. Raises LayoutInvalid."""
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise LayoutInvalid(source, "manifest.json is not JSON") from exc
    if isinstance(entries, dict) and "schemaVersion" in entries:
        raise LayoutInvalid(source, SKOPEO_DIR)
    if not isinstance(entries, list):
        raise LayoutInvalid(source, "manifest.json is not a list")
    if any(isinstance(each, dict) and _IMGPKG.issubset(each) for each in entries):
        raise LayoutInvalid(
            source,
            "is a tar of imgpkg's: copy it into a registry (imgpkg copy --tar FILE --to-repo "
            "REGISTRY/REPOSITORY), and load it from there",
        )
    images: list[NamedImage] = []
    for position, entry in enumerate(entries):
        where = f"manifest.json, image {position + 1}"
        try:
            images += _images(entry, saved, extractor)
        except (_Malformed, MalformedManifest, NameInvalid) as exc:
            images.append(unreadable(f"{where}: {exc}"))
    return images, [_NOTE] if images else []


class _Malformed(ValueError):
    """An entry of manifest.json that makes no image."""


def _images(entry: object, saved: SavedFiles, extractor: Extractor) -> list[NamedImage]:
    if not isinstance(entry, dict):
        raise _Malformed("is not an object")
    config_digest = _find(saved, entry.get("Config"), "config")
    layer_names = entry.get("Layers") or []
    if not isinstance(layer_names, list) or len(layer_names) > _MAX_LAYERS:
        raise _Malformed("Layers is not a list of files")
    config = extractor.find_document(config_digest)
    if config is None:
        raise _Malformed(f"config {config_digest} is damaged")
    layers = [_layer(_find(saved, name, "layer"), extractor) for name in layer_names]
    _check_layers(config, layers)
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor(_CONFIG, config_digest, len(config)).to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    raw = json.dumps(document, separators=(",", ":")).encode()
    descriptor = Descriptor(OCI_MANIFEST, Digest.of(raw), len(raw))
    extractor.take_document(raw, descriptor.digest)
    tags = entry.get("RepoTags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise _Malformed("RepoTags is not a list of names")
    names = [Reference.parse(tag) for tag in tags if not tag.endswith(f":{NO_TAG}")]
    if not names:
        return [NamedImage(descriptor, None)]
    return [NamedImage(descriptor, name) for name in names]


def _find(saved: SavedFiles, name: object, what: str) -> Digest:
    if not isinstance(name, str):
        raise _Malformed(f"has no {what}")
    digest = saved.find(posixpath.normpath(name))
    if digest is None:
        raise _Malformed(f"{what} {shorten(name)} is not in the archive, or cut off")
    return digest


def _layer(digest: Digest, extractor: Extractor) -> Descriptor:
    found = extractor.find_blob(digest)
    if found is None:
        reason = extractor.damaged.get(digest, "not in the archive")
        raise _Malformed(f"layer {digest}: {reason}")
    head, size = found
    packed = next((suffix for magic, suffix in _PACKED.items() if head.startswith(magic)), "")
    return Descriptor(f"{_LAYER}{packed}", digest, size)


def _check_layers(config: bytes, layers: list[Descriptor]) -> None:
    """The config has the digest of each layer's plain tar (`diff_ids`), which shows a layer in the
    wrong place. Packed layers are not compared: they have another digest. Raises _Malformed."""
    rootfs = json_object(config).get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise _Malformed(f"the config does not speak of {len(layers)} layers")
    for layer, diff_id in zip(layers, diff_ids, strict=True):
        try:
            expected = Digest.parse(str(diff_id))
        except DigestInvalid as exc:
            raise _Malformed(f"the config's diff_ids: {exc}") from exc
        if layer.media_type == _LAYER and layer.digest != expected:
            raise _Malformed(f"layer {layer.digest} is not {expected}, which the config asks for")
