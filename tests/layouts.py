"""OCI image layouts and archives of them, made without the product's own code."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.images import OCI_INDEX, Content, Image
from tests.images import content as content_of

REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
MARKER = b'{"imageLayoutVersion": "1.0.0"}'


def blob_path(content: Content) -> str:
    algorithm, _, encoded = content.digest.partition(":")
    return f"blobs/{algorithm}/{encoded}"


def index_json(images: Iterable[tuple[str, Content]], *, key: str = IMAGE_NAME) -> bytes:
    """`index.json` with an entry for each name and manifest; an empty name is left out."""
    entries = [
        top.descriptor(**({"annotations": {key: name}} if name else {})) for name, top in images
    ]
    return json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


def members(
    images: Mapping[str, Image],
    *,
    key: str = IMAGE_NAME,
    without: Iterable[Content] = (),
    replaced: Mapping[str, bytes] | None = None,
) -> Iterator[tuple[str, bytes]]:
    """The files of a layout, parents first; `without` and `replaced` (by digest) do damage."""
    yield "oci-layout", MARKER
    yield "index.json", index_json([(name, i.top) for name, i in images.items()], key=key)
    skipped = {each.digest for each in without}
    manifests = [each for image in images.values() for each in (image.top, *image.manifests)]
    blobs = [each for image in images.values() for each in image.blobs]
    for content in (*manifests, *blobs):
        if content.digest not in skipped:
            skipped.add(content.digest)
            yield blob_path(content), (replaced or {}).get(content.digest, content.data)


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.write_bytes(tar_bytes(files))
    return path


def tar_bytes(files: Iterable[tuple[str, bytes]]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def called(image: Image, media_type: str) -> Image:
    """An index that calls this image by another media type than its own."""
    child = image.top.descriptor(mediaType=media_type)
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child]}
    top = content_of(json.dumps(document).encode(), OCI_INDEX)
    return Image(top, (image.top,), image.blobs)
