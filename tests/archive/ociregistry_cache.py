"""Cache folders as ociregistry 1.3 and 1.17 write them, byte for byte (Go's `json.Marshal`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.images import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Content,
    Image,
)

_TYPES = [DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST]
_NO_INDEX = {"schemaVersion": 0, "manifests": None}
_NO_LIST = {"schemaVersion": 0, "mediaType": "", "manifests": None}
_NO_OCI = {
    "schemaVersion": 0,
    "config": {"mediaType": "", "digest": "", "size": 0},
    "layers": None,
}
_NO_DOCKER = {"schemaVersion": 0, "config": {}, "layers": None}


def holder_1_17(content: Content, name: str) -> bytes:
    kind = _TYPES.index(content.media_type)
    document = _in_order(content.json())
    return _marshal(
        {
            "type": kind,
            "digest": content.encoded,
            "imageUrl": name,
            "bytes": base64.b64encode(content.data).decode(),
            "v1.oci.index": document if kind == 2 else _NO_INDEX,
            "v1.oci.manifest": document if kind == 3 else _NO_OCI,
            "v2.docker.manifestList": document if kind == 0 else _NO_LIST,
            "v2.docker.manifest": document if kind == 1 else _NO_DOCKER,
            "created": "2026-01-02T03:04:05",
            "pulled": "2026-01-02T03:04:06",
        }
    )


def holder_1_3(content: Content, name: str) -> bytes:
    kind = _TYPES.index(content.media_type)
    document = _in_order(content.json())
    remote, org, rest = name.split("/")
    by_digest = "@" in rest
    image, _, reference = rest.partition("@" if by_digest else ":")
    described = {"mediaType": content.media_type if kind == 3 else "", "digest": "", "size": 0}
    return _marshal(
        {
            "pullRequest": {
                "pullType": int(by_digest),
                "org": org,
                "image": image,
                "reference": reference,
                "remote": remote,
            },
            "imageUrl": name,
            "mediaType": content.media_type,
            "digest": content.encoded,
            "size": content.size,
            "bytes": base64.b64encode(content.data).decode(),
            "tarfile": "",
            "type": kind,
            "v1.oci.index": document if kind == 2 else _NO_INDEX,
            "v1.oci.descriptor": described,
            "v2.docker.manifesList": document if kind == 0 else _NO_LIST,
            "v2.docker.Manifest": document if kind == 1 else _NO_DOCKER,
        }
    )


def write_cache(folder: Path, version: str, images: Mapping[str, Image]) -> Path:
    """As after pulls by tag, each followed by one of every platform by digest."""
    for name, image in images.items():
        repository = name.rpartition(":")[0]
        named = [(image.top, name)]
        named += [(child, f"{repository}@{child.digest}") for child in image.manifests]
        for content, url in named:
            if version == "1.3":
                kind = "fat" if content.media_type in (DOCKER_LIST, OCI_INDEX) else "img"
                data = holder_1_3(content, url)
            else:
                kind = "lts" if url.endswith(":latest") else "img"
                data = holder_1_17(content, url)
            _write(folder / kind / content.encoded, data)
        for blob in image.blobs:
            _write(folder / "blobs" / blob.encoded, blob.data)
    return folder


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _in_order(value: Any) -> Any:
    """Keys in the order of the structs, which is not that of the fixture's documents."""
    if isinstance(value, list):
        return [_in_order(each) for each in value]
    if not isinstance(value, dict):
        return value
    order = ["schemaVersion", "mediaType", "digest", "size", "architecture", "os", "variant"]
    keys = [key for key in order if key in value]
    keys += [key for key in value if key not in order]
    return {key: _in_order(value[key]) for key in keys}


def _marshal(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
