"""Image content made in code, without the product's own code: the product is checked against it.

Everything is deterministic: the same arguments give the same digests, in any process.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MIB = 1024 * 1024
STATIC_BUSYBOX = Path("/bin/busybox")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes, the media type they are served with, and their digest."""

    media_type: str
    data: bytes = field(repr=False)
    digest: str

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def encoded(self) -> str:
        """The digest without its algorithm: the file name in the store."""
        return self.digest.partition(":")[2]

    def descriptor(self, **extra: object) -> Json:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **extra}

    def json(self) -> Json:
        document: Json = json.loads(self.data)
        return document


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer blob and the digest of its uncompressed tar, which the config has to name."""

    content: Content
    diff_id: str


@dataclass(frozen=True, slots=True)
class Image:
    """A manifest with everything it refers to; for an index `manifests` holds its children."""

    top: Content
    manifests: tuple[Content, ...] = ()
    blobs: tuple[Content, ...] = ()

    @property
    def digest(self) -> str:
        return self.top.digest

    @property
    def layers(self) -> tuple[Content, ...]:
        """All blobs but the configs."""
        return tuple(blob for blob in self.blobs if blob.media_type in (OCI_LAYER, DOCKER_LAYER))

    def all_manifests(self) -> Iterator[Content]:
        """Children first: the order in which a registry accepts them."""
        yield from self.manifests
        yield self.top

    def all_content(self) -> Iterator[Content]:
        yield from self.blobs
        yield from self.all_manifests()


def content(
    data: bytes, media_type: str = "application/octet-stream", *, algorithm: str = "sha256"
) -> Content:
    encoded = hashlib.new(algorithm, data).hexdigest()
    return Content(media_type, data, f"{algorithm}:{encoded}")


def random_bytes(size: int, *, seed: object = 0) -> bytes:
    source = random.Random(f"ociproxy {seed}")  # reproducible, not secret
    parts = [source.randbytes(min(MIB, size - at)) for at in range(0, size, MIB)]
    return b"".join(parts)


def random_blob(size: int, *, seed: object = 0, algorithm: str = "sha256") -> Content:
    """A blob of exactly `size` bytes. It is no tar, so no client can unpack it."""
    return content(random_bytes(size, seed=seed), OCI_LAYER, algorithm=algorithm)


def layer(
    files: Mapping[str, bytes], *, docker: bool = False, links: Mapping[str, str] | None = None
) -> Layer:
    """A real tar.gz. Compression is off: random content would only cost time."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folders = {p for name in files for p in Path(name).parents if p != Path()}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder.as_posix())
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    tar_bytes = plain.getvalue()
    # Not by `gzip`: its header is another one from Python 3.13 on, and so every digest would be.
    packed = zlib.compress(tar_bytes, level=0, wbits=zlib.MAX_WBITS | 16)
    diff_id = "sha256:" + hashlib.sha256(tar_bytes).hexdigest()
    return Layer(content(packed, DOCKER_LAYER if docker else OCI_LAYER), diff_id)


def image(
    name: str = "tiny",
    *,
    docker: bool = False,
    layers: int = 1,
    layer_size: int = 100,
    platform: str = "linux/amd64",
    annotations: Mapping[str, str] | None = None,
    pad_to: int = 0,
    command: Sequence[str] = ("/hello",),
) -> Image:
    """A single-platform image whose layers each hold one file of `layer_size` random bytes.

    `name` makes it differ from others; `pad_to` is the exact size wanted for the manifest.
    """
    made = [
        layer(
            {f"data/{name}-{n}": random_bytes(layer_size, seed=f"{name} {platform} {n}")},
            docker=docker,
        )
        for n in range(layers)
    ]
    return image_of(
        made,
        docker=docker,
        platform=platform,
        annotations=annotations,
        pad_to=pad_to,
        command=command,
    )


def image_of(
    layers: Iterable[Layer],
    *,
    docker: bool = False,
    platform: str = "linux/amd64",
    annotations: Mapping[str, str] | None = None,
    pad_to: int = 0,
    command: Sequence[str] = ("/hello",),
) -> Image:
    layers = tuple(layers)
    config = _json(
        {
            **_platform(platform),
            "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [each.diff_id for each in layers]},
            "history": [{"created_by": "tests"} for _ in layers],
        },
        DOCKER_CONFIG if docker else OCI_CONFIG,
    )
    manifest: Json = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else OCI_MANIFEST,
        "config": config.descriptor(),
        "layers": [each.content.descriptor() for each in layers],
    }
    if annotations or pad_to:
        manifest["annotations"] = dict(annotations or {})
    if pad_to:
        manifest["annotations"]["pad"] = ""
        missing = pad_to - _json(manifest, OCI_MANIFEST).size
        manifest["annotations"]["pad"] = "x" * missing
    blobs = (config, *(each.content for each in layers))
    return Image(_json(manifest, manifest["mediaType"]), blobs=blobs)


def index(images: Mapping[str, Image], *, docker: bool = False) -> Image:
    """An OCI index, or a Docker manifest list, of images by platform (`os/arch[/variant]`)."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    children = [
        each.top.descriptor(platform=_platform(platform)) for platform, each in images.items()
    ]
    top = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": children}, media_type)
    blobs = {blob.digest: blob for each in images.values() for blob in each.blobs}
    return Image(top, tuple(each.top for each in images.values()), tuple(blobs.values()))


def attested_index(images: Mapping[str, Image]) -> tuple[Image, dict[str, Image]]:
    """An index as BuildKit makes it, with an attestation of each image; and these by platform."""
    about = {name: artifact(each.top, data=each.digest.encode()) for name, each in images.items()}
    unknown = {"architecture": "unknown", "os": "unknown"}
    children = [each.top.descriptor(platform=_platform(name)) for name, each in images.items()]
    for name, attestation in about.items():
        annotations = {
            "vnd.docker.reference.type": "attestation-manifest",
            "vnd.docker.reference.digest": images[name].digest,
        }
        children.append(attestation.top.descriptor(platform=unknown, annotations=annotations))
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}
    parts = [*images.values(), *about.values()]
    blobs = {blob.digest: blob for each in parts for blob in each.blobs}
    made = Image(
        _json(document, OCI_INDEX), tuple(each.top for each in parts), tuple(blobs.values())
    )
    return made, about


def multi_platform(
    name: str = "multi",
    *,
    docker: bool = False,
    platforms: Sequence[str] = ("linux/amd64", "linux/arm64", "linux/arm/v7"),
    layers: int = 1,
    layer_size: int = 100,
) -> Image:
    images = {
        each: image(name, docker=docker, platform=each, layers=layers, layer_size=layer_size)
        for each in platforms
    }
    return index(images, docker=docker)


def artifact(
    subject: Content, *, artifact_type: str = "application/vnd.example.sbom.v1", data: bytes = b"{}"
) -> Image:
    """A referrer: an OCI manifest with a `subject`, as signatures and attestations are stored."""
    empty = content(b"{}", OCI_EMPTY)
    payload = content(data, artifact_type)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": empty.descriptor(),
        "layers": [payload.descriptor()],
        "subject": subject.descriptor(),
        "annotations": {"org.example.kind": "test"},
    }
    return Image(_json(manifest, OCI_MANIFEST), blobs=(empty, payload))


def runnable(*, docker: bool = False) -> Image:
    """An image a container can be started from; FileNotFoundError without a static busybox."""
    commands = ("sh", "echo", "cat", "ls", "sleep", "true")
    made = layer(
        {"bin/busybox": STATIC_BUSYBOX.read_bytes(), "etc/greeting": b"hello from ociproxy\n"},
        docker=docker,
        links={f"bin/{name}": "busybox" for name in commands},
    )
    return image_of([made], docker=docker, command=("/bin/cat", "/etc/greeting"))


def _platform(text: str) -> Json:
    keys = ("os", "architecture", "variant")
    return dict(zip(keys, text.split("/"), strict=False))


def _json(document: Json, media_type: str) -> Content:
    # Indented: a proxy that re-serialises the document changes its digest and is caught.
    return content(json.dumps(document, indent=3).encode(), media_type)
