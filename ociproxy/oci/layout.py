"""The OCI image layout: its file names, its two JSON files, and the names that it gives images.

Image-spec: image-layout.md and annotations.md. `io.containerd.image.name` is containerd's
convention and not the specification's, but the one place that is certain to hold full names. Only
names and bytes are read here; `store.extract` verifies them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, LayoutInvalid, NameInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, Index, json_object, parse_manifest
from ociproxy.oci.media_types import OCI_INDEX
from ociproxy.oci.reference import Reference, is_tag

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

MARKER: Final = "oci-layout"
INDEX: Final = "index.json"
BLOBS: Final = "blobs"
VERSION: Final = "1.0.0"
VERSION_KEY: Final = "imageLayoutVersion"
REF_NAME: Final = "org.opencontainers.image.ref.name"
IMAGE_NAME: Final = "io.containerd.image.name"

INDEX_MAX_SIZE: Final = 16 * 1024 * 1024
"""Bytes of `index.json`: it has an entry an image, so that it may be larger than a manifest."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An entry of `index.json`: a manifest and what the layout calls it.

    `reference` is None where no full name is given; `tag` is then the bare tag, if there is one,
    and `problem` says what is wrong with a name that cannot be one.
    """

    descriptor: Descriptor
    reference: Reference | None
    tag: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return str(self.reference or self.tag or self.descriptor.digest)


def blob_path(digest: Digest) -> str:
    """Where a layout has a blob; manifests are blobs too."""
    return f"{BLOBS}/{digest.algorithm}/{digest.encoded}"


def parse_blob_path(path: str) -> Digest | None:
    """The digest that a path in a layout is named by; None for any other path."""
    parts = path.split("/")
    if len(parts) != 3 or parts[0] != BLOBS:
        return None
    try:
        return Digest.parse(f"{parts[1]}:{parts[2]}")
    except DigestInvalid:
        return None


def check_marker(raw: bytes, source: str) -> None:
    """Raises LayoutInvalid unless `oci-layout` says a version that is known."""
    try:
        version = json_object(raw).get(VERSION_KEY)
    except MalformedManifest as exc:
        raise LayoutInvalid(source, f"{MARKER} is {exc}") from exc
    if version != VERSION:
        raise LayoutInvalid(source, f"layout version {version!r}, this program reads {VERSION}")


def parse_index(raw: bytes, source: str) -> tuple[NamedImage, ...]:
    """The images of an `index.json`, in its order. Raises LayoutInvalid."""
    try:
        index = parse_manifest(raw, OCI_INDEX)
    except MalformedManifest as exc:
        raise LayoutInvalid(source, f"{INDEX}: {exc}") from exc
    assert isinstance(index, Index)  # noqa: S101 what the media type says
    return tuple(map(named, index.manifests))


def named(descriptor: Descriptor) -> NamedImage:
    """What the annotations of a descriptor in `index.json` call it."""
    annotations = dict(descriptor.annotations)
    name, ref_name = annotations.get(IMAGE_NAME, ""), annotations.get(REF_NAME, "")
    # A name with a registry or a repository in it; what has neither is a tag.
    full = name or (ref_name if any(mark in ref_name for mark in "/:@") else "")
    if not full:
        return NamedImage(descriptor, None, ref_name if is_tag(ref_name) else "")
    try:
        reference = Reference.parse(full)
    except (NameInvalid, DigestInvalid) as exc:
        return NamedImage(descriptor, None, problem=str(exc))
    if reference.digest not in (None, descriptor.digest):
        return NamedImage(descriptor, None, problem=f"{reference} is not {descriptor.digest}")
    return NamedImage(descriptor, reference)


class LayoutDirectory:
    """A layout as a folder. Raises LayoutInvalid for what is none or cannot be read.

    Symbolic links are not followed, for a layout may come from anywhere.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def source(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Raises LayoutInvalid unless this is a layout of a version that is known."""
        check_marker(self._read(MARKER, MANIFEST_MAX_SIZE), self.source)

    def images(self) -> tuple[NamedImage, ...]:
        return parse_index(self._read(INDEX, INDEX_MAX_SIZE), self.source)

    def open_blob(self, digest: Digest) -> FileIO | None:
        """None where it is not there; layouts may lack blobs."""
        return self._open(blob_path(digest))

    def find(self, path: str, limit: int) -> bytes | None:
        """The bytes of a small file of the layout; None where it is not there."""
        file = self._open(path)
        if file is None:
            return None
        with file:
            raw = file.read(limit + 1)
        if raw is None or len(raw) > limit:
            raise LayoutInvalid(self.source, f"{path} is larger than {limit} bytes")
        return raw

    def _read(self, path: str, limit: int) -> bytes:
        raw = self.find(path, limit)
        if raw is None:
            raise LayoutInvalid(self.source, f"has no {path}, so it is no OCI image layout")
        return raw

    def _open(self, path: str) -> FileIO | None:
        return open_regular(self.root, path)


def open_regular(root: Path, path: str) -> FileIO | None:
    """A file below a folder that may come from anywhere; None where there is none.

    Raises LayoutInvalid for links, pipes and what cannot be read.
    """
    try:
        file = open(root / path, "rb", buffering=0, opener=_opener)  # noqa: SIM115 the caller closes
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise LayoutInvalid(str(root), f"{path}: {(exc.strerror or str(exc)).lower()}") from exc
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LayoutInvalid(str(root), f"{path} is not a regular file")
    return file


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK the open of a pipe would wait for a writer.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
