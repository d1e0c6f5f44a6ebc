"""The OCI image layout: its file names, its two JSON files, and the names that it gives images.

OCI image-spec: image-layout.md and annotations.md. `io.containerd.image.name` is containerd's
annotation and not the spec's, but the only one that always holds full names. This module reads
names and bytes; `store.extract` verifies them."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, LayoutInvalid, NameInvalid
from ociproxy.oci.descriptor import OCI_INDEX, Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, Index, json_object, parse_manifest
from ociproxy.oci.reference import Reference

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
NO_IMAGES: Final = (
    f"has blobs, but its {INDEX} lists no image: make it anew with the images named, as by "
    "skopeo copy ... oci-archive:FILE:REGISTRY/REPOSITORY:TAG"
)
_MADE_UP: Final = re.compile(
    r"sha256:[0-9a-f]{64}|import-\d{4}-\d{2}-\d{2}(?:@.*|:(?P<tag>.*))?", re.ASCII
)
"""What containerd calls an image for itself: by the digest of its config, for the kubelet, and by
the day of an import, if an archive gave it no full name."""
NO_TAG: Final = "i-was-a-digest"
"""crane writes this for the tag of an image that it pulled by digest."""
_KIND: Final = "kind"
_KINDS_OF: Final = frozenset({"dev.hauler", "dev.cosignproject.cosign"})
"""Beginnings of the values of `kind`; other values are other tools' affair."""

INDEX_MAX_SIZE: Final = 16 * 1024 * 1024
"""Bytes of `index.json`. It has an entry for each image, so it may be larger than a manifest."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An entry of `index.json`: a manifest and the name that the layout gives it.

    `reference` is None without a valid full name. Then `tag` is the bare tag, if the entry has one,
    which may be an invalid one, and `problem` says why its name is invalid, if it is. `kind` is
    what hauler and cosign call it, as `image`, `sigs` or `referrers/...`; empty from other tools.
    """

    descriptor: Descriptor
    reference: Reference | None
    tag: str = ""
    problem: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return str(self.reference or self.tag or self.descriptor.digest)


def blob_path(digest: Digest) -> str:
    """The path of a blob in a layout, where manifests are blobs, too."""
    return f"{BLOBS}/{digest.algorithm}/{digest.encoded}"


def parse_blob_path(path: str) -> Digest | None:
    """The digest of the blob at a path in a layout; None if the path is not that of a blob."""
    parts = path.split("/")
    if len(parts) != 3 or parts[0] != BLOBS:
        return None
    try:
        return Digest.parse(f"{parts[1]}:{parts[2]}")
    except DigestInvalid:
        return None


def check_marker(raw: bytes, source: str) -> None:
    """Raises LayoutInvalid unless the bytes of `oci-layout` name the version 1.0.0."""
    try:
        version = json_object(raw).get(VERSION_KEY)
    except MalformedManifest as exc:
        raise LayoutInvalid(source, f"{MARKER} is {exc}") from exc
    if version != VERSION:
        raise LayoutInvalid(source, f"layout version {version!r}, this program reads {VERSION}")


def parse_index(raw: bytes, source: str) -> tuple[NamedImage, ...]:
    """The images of an `index.json`, in its order. `source` is for messages. Raises
    LayoutInvalid."""
    try:
        index = parse_manifest(raw, OCI_INDEX)
    except MalformedManifest as exc:
        raise LayoutInvalid(source, f"{INDEX}: {exc}") from exc
    assert isinstance(index, Index)  # noqa: S101 what the media type says
    return tuple(map(named, index.manifests))


def named(descriptor: Descriptor) -> NamedImage:
    """The name that the annotations of a descriptor in `index.json` give it."""
    annotations = dict(descriptor.annotations)
    tool, _, kind = annotations.get(_KIND, "").partition("/")
    return replace(_named(descriptor, annotations), kind=kind if tool in _KINDS_OF else "")


def _named(descriptor: Descriptor, annotations: dict[str, str]) -> NamedImage:
    name, ref_name = annotations.get(IMAGE_NAME, ""), annotations.get(REF_NAME, "")
    # A full name holds a registry or a repository; a text without either is a tag, or was meant to
    # be one: then it is told to the operator.
    full = name or (ref_name if any(mark in ref_name for mark in "/:@") else "")
    if not full:
        return NamedImage(descriptor, None, ref_name if ref_name.isprintable() else "")
    if (made_up := _MADE_UP.fullmatch(full)) is not None:
        return NamedImage(descriptor, None, made_up["tag"] or "")
    try:
        reference = Reference.parse(full)
        if reference.tag == NO_TAG:
            reference = Reference(reference.repository, digest=descriptor.digest)
    except (NameInvalid, DigestInvalid) as exc:
        return NamedImage(descriptor, None, problem=str(exc))
    if reference.digest not in (None, descriptor.digest):
        return NamedImage(descriptor, None, problem=f"{reference} is not {descriptor.digest}")
    return NamedImage(descriptor, reference)


class LayoutDirectory:
    """A layout in a folder. Methods raise LayoutInvalid if it is no layout, or cannot be read.

    The last component of a path must be no symbolic link, for a layout may come from anywhere.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def source(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Raises LayoutInvalid unless this is a layout of version 1.0.0."""
        check_marker(self._read(MARKER, MANIFEST_MAX_SIZE), self.source)

    def images(self) -> tuple[NamedImage, ...]:
        """The images of `index.json`, in its order."""
        return parse_index(self._read(INDEX, INDEX_MAX_SIZE), self.source)

    def open_blob(self, digest: Digest) -> FileIO | None:
        """Open a blob, which the caller closes; None if the layout lacks it."""
        return open_regular(self.root, blob_path(digest))

    def find(self, path: str, limit: int) -> bytes | None:
        """The bytes of a file of the layout, at most `limit`; None if the file is not there."""
        file = open_regular(self.root, path)
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


def open_regular(root: Path, path: str) -> FileIO | None:
    """Open a file below a folder that may come from anywhere; the caller closes it. None if there
    is no such file.

    Raises LayoutInvalid for links, pipes, folders and files that cannot be read.
    """
    try:
        file = open(root / path, "rb", buffering=0, opener=_opener)  # noqa: SIM115 the caller closes
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise LayoutInvalid(str(root), f"{path}: is a symbolic link: not followed") from exc
        raise LayoutInvalid(str(root), f"{path}: {(exc.strerror or str(exc)).lower()}") from exc
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LayoutInvalid(str(root), f"{path} is not a regular file")
    return file


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for a process that writes to it.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
