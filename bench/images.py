"""Generated images: random layers, pushed to the upstream by its HTTP API, and laid out as files.

One big blob lives in four repositories; one small image carries the manifest that is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
from collections import ChainMap
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from bench.processes import BenchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.servers import Target

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
COMPRESSED_LAYER_TYPE = f"{LAYER_TYPE}+gzip"
REPOSITORIES = ("bench/one", "bench/two", "team/three", "team/sub/four")
TAG = "v1"
SMALL_LAYERS = 6
SMALL_LAYER_BYTES = 4096


@dataclass(frozen=True)
class Images:
    """What a client may ask for; the small image is in the first repository."""

    blob: str
    size: int
    manifest: str
    manifest_raw: bytes
    static: Path


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def push_images(upstream: Target, static: Path, size: int) -> Images:
    first, *others = REPOSITORIES
    big = os.urandom(size)
    push = _Push(upstream)
    blob = push.blob(first, big)
    for repository in others:
        push.mount(repository, blob, source=first)
    layers = [os.urandom(SMALL_LAYER_BYTES) for _ in range(SMALL_LAYERS)]
    raw = _manifest([(push.blob(first, layer), len(layer)) for layer in layers], push, first)
    manifest = push.manifest(first, TAG, raw)
    for repository in REPOSITORIES:
        push.manifest(repository, "big", _manifest([(blob, size)], push, repository))
    push.close()
    _lay_out(static / "v2" / first, {f"blobs/{blob}": big})
    names = {f"manifests/{TAG}": raw, f"manifests/{manifest}": raw}
    _lay_out(static / "v2" / first, names)
    return Images(blob, size, manifest, raw, static)


MANY = "bench/many"


def lay_out_manifests(static: Path, count: int) -> list[str]:
    """Different manifests of images that share their one layer, as files that nginx serves; returns
    their tags."""
    config, layer = b"{}", b"\0" * 1024
    root = static / "v2" / MANY
    _lay_out(root, {f"blobs/{digest_of(data)}": data for data in (config, layer)})
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(CONFIG_TYPE, digest_of(config), len(config)),
        "layers": [_descriptor(LAYER_TYPE, digest_of(layer), len(layer))],
    }
    tags = [f"v{number}" for number in range(count)]
    raw = {tag: json.dumps({**document, "annotations": {"tag": tag}}, indent=2) for tag in tags}
    _lay_out(root, {f"manifests/{tag}": text.encode() for tag, text in raw.items()})
    return tags


@dataclass(frozen=True)
class Family:
    """Images that share layers: for each repository the bytes of the blobs of its image."""

    blobs: dict[str, dict[str, int]]

    @property
    def repositories(self) -> list[str]:
        return list(self.blobs)

    @property
    def size(self) -> int:
        """Bytes of all different blobs."""
        return sum(ChainMap(*self.blobs.values()).values())

    def first(self, count: int) -> Family:
        return Family(dict(islice(self.blobs.items(), count)))


def push_family(upstream: Target, count: int) -> Family:
    """Each has one of five large bases, one of twenty middle layers, and a layer of its own."""
    push = _Push(upstream)
    layers: dict[str, tuple[str, str, int]] = {}
    blobs: dict[str, dict[str, int]] = {}

    def layer(repository: str, name: str, size: int) -> tuple[str, int]:
        """Pushed once, mounted where it is wanted again."""
        known = layers.get(name)
        if known is None:
            # Compressed, or skopeo would do it, and then share nothing.
            data = gzip.compress(os.urandom(size), 1)
            known = layers[name] = repository, push.blob(repository, data), len(data)
        else:
            push.mount(repository, known[1], source=known[0])
        return known[1:]

    for number in range(count):
        repository = f"family/member{number}"
        raw = _manifest(
            [
                layer(repository, f"base{number % 5}", 8_000_000),
                layer(repository, f"middle{number % 20}", 1_000_000),
                layer(repository, f"own{number}", 200_000),
            ],
            push,
            repository,
            layer_type=COMPRESSED_LAYER_TYPE,
        )
        document = json.loads(raw)
        described = (document["config"], *document["layers"])
        blobs[repository] = {each["digest"]: each["size"] for each in described}
        push.manifest(repository, TAG, raw)
    push.close()
    return Family(blobs)


def verify(target: Target, images: Images) -> None:
    """One checked download of everything: a fast server that answers wrong bytes has no place."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
    try:
        for reference in (TAG, images.manifest):
            connection.request(
                "GET",
                target.manifest(REPOSITORIES[0], reference),
                headers={"Accept": MANIFEST_TYPE},
            )
            response = connection.getresponse()
            if response.read() != images.manifest_raw:
                raise BenchError(
                    f"{target.name}: wrong manifest for {reference}: {response.status}"
                )
        connection.request("GET", target.blob(REPOSITORIES[0], images.blob))
        response = connection.getresponse()
        hasher = hashlib.sha256()
        while chunk := response.read(1 << 20):
            hasher.update(chunk)
        if "sha256:" + hasher.hexdigest() != images.blob:
            raise BenchError(f"{target.name}: wrong blob: {response.status}")
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{target.name}: {error!r}") from error
    finally:
        connection.close()


class _Push:
    """The four requests of a push, over one connection."""

    def __init__(self, upstream: Target) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=60)

    def close(self) -> None:
        self._connection.close()

    def blob(self, repository: str, data: bytes) -> str:
        digest = digest_of(data)
        path = f"/v2/{repository}/blobs/uploads/"
        location = urlsplit(self._send("POST", path, HTTPStatus.ACCEPTED)["Location"])
        query = f"{location.query}&{urlencode({'digest': digest})}"
        headers = {"Content-Type": "application/octet-stream"}
        self._send("PUT", f"{location.path}?{query}", HTTPStatus.CREATED, data, headers)
        return digest

    def mount(self, repository: str, digest: str, *, source: str) -> None:
        query = urlencode({"mount": digest, "from": source})
        self._send("POST", f"/v2/{repository}/blobs/uploads/?{query}", HTTPStatus.CREATED)

    def manifest(self, repository: str, tag: str, raw: bytes) -> str:
        headers = {"Content-Type": MANIFEST_TYPE}
        self._send("PUT", f"/v2/{repository}/manifests/{tag}", HTTPStatus.CREATED, raw, headers)
        return digest_of(raw)

    def _send(
        self,
        method: str,
        path: str,
        expected: HTTPStatus,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Mapping[str, str]:
        self._connection.request(method, path, body, headers or {})
        response = self._connection.getresponse()
        text = response.read()
        if response.status != expected:
            raise BenchError(f"push: {method} {path}: {response.status} {text[:200]!r}")
        return dict(response.headers.items())


def _manifest(
    layers: list[tuple[str, int]], push: _Push, repository: str, *, layer_type: str = LAYER_TYPE
) -> bytes:
    diff_ids = [digest for digest, _ in layers]
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    ).encode()
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(CONFIG_TYPE, push.blob(repository, config), len(config)),
        "layers": [_descriptor(layer_type, digest, size) for digest, size in layers],
    }
    return json.dumps(document, indent=2).encode()


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, str | int]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _lay_out(root: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
