"""A store of 100,000 manifests and 20,000 blobs, written file by file: in a minute, not in hours.

Its images are as those of public registries: four in five have an index of four platforms, all have
layers of other images. Layers are sparse, configs and manifests are whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ociproxy.store.files import seal
from ociproxy.store.store import Store

OCI = "application/vnd.oci.image"
PLATFORMS = (("amd64", ""), ("arm64", "v8"), ("arm", "v7"), ("ppc64le", ""))
REGISTRIES = ("docker.io", "quay.io", "ghcr.io", "registry.k8s.io")
TAGS_OF_ONE = 20
"""Of one repository."""
OWN, BASE = 4, 2
"""Layers of an image: those of its repository, and those of images on which many are built."""
WINDOW = 64
"""Layers that a repository has to choose from; as many in all are those of bases."""
CONFIGS = 5
"""One blob in so many is a config."""
SINGLE = 5
"""One image in so many has no index."""
LAYER = 4 << 20
"""Bytes of a layer, at most."""
USED = 1_790_000_000
"""When all was stored and used: seconds since the epoch."""


@dataclass(frozen=True)
class Many:
    """How much there is to be."""

    manifests: int = 100_000
    blobs: int = 20_000

    @property
    def images(self) -> int:
        """Of `SINGLE` images all but one have an index beside their platforms' manifests."""
        return self.manifests * SINGLE // ((SINGLE - 1) * (1 + len(PLATFORMS)) + 1)


def make_store(root: Path, many: Many) -> None:
    """Fill an empty folder. The same numbers make the same store again."""
    Store(root)
    chance = random.Random(many.blobs)
    configs, layers = _blobs(root, many, chance)
    writer = _Writer(root)
    apart = len(layers) * TAGS_OF_ONE // many.images
    """Layers between the windows of two repositories."""
    for number in range(many.images):
        repository = _repository(number // TAGS_OF_ONE)
        first = number // TAGS_OF_ONE * apart
        own = [layers[(first + each) % len(layers)] for each in range(WINDOW)]
        tag = f"{number % TAGS_OF_ONE}.0"
        if number % SINGLE == 0:
            top = writer.image(number, "", configs, own, layers[:WINDOW], chance)
            writer.record(repository, top)
        else:
            children = []
            for place in PLATFORMS:
                child = writer.image(number, "".join(place), configs, own, layers[:WINDOW], chance)
                writer.record(repository, child)
                architecture, variant = place
                platform = {"architecture": architecture, "os": "linux"}
                children.append({**child, "platform": platform | _given(variant=variant)})
            media_type = f"{OCI}.index.v1+json"
            index = {"schemaVersion": 2, "mediaType": media_type, "manifests": children}
            top = writer.manifest("fat", media_type, index)
            writer.record(repository, top)
        writer.tag(repository, tag, top)


def _given(**fields: str) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}


def _repository(number: int) -> Path:
    return Path(REGISTRIES[number % len(REGISTRIES)], f"team-{number % 50}", f"app-{number}")


def _blobs(
    root: Path, many: Many, chance: random.Random
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Descriptors of configs and layers."""
    configs, layers = [], []
    for number in range(many.blobs):
        if number % CONFIGS == 0:
            architecture, variant = PLATFORMS[number // CONFIGS % len(PLATFORMS)]
            document = {
                "architecture": architecture,
                "os": "linux",
                **_given(variant=variant),
                "config": {"Env": [f"NUMBER={number}"], "Cmd": ["/bin/app"]},
                "history": [{"created_by": "RUN make" * 8}] * 12,
            }
            raw = json.dumps(document).encode()
            name, size = sha256(raw).hexdigest(), len(raw)
            configs.append(_descriptor(f"{OCI}.config.v1+json", name, size))
        else:
            raw, name = b"", sha256(b"%d" % number).hexdigest()
            size = chance.randrange(1, LAYER)
            layers.append(_descriptor(f"{OCI}.layer.v1.tar+gzip", name, size))
        file = os.open(root / "blobs" / name, os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(file, raw)
        os.ftruncate(file, size)
        seal(file, name, USED + number)
        os.close(file)
    return configs, layers


def _descriptor(media_type: str, name: str, size: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": size}


class _Writer:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: set[Path] = set()

    def image(
        self,
        number: int,
        platform: str,
        configs: list[dict[str, object]],
        own: list[dict[str, object]],
        base: list[dict[str, object]],
        chance: random.Random,
    ) -> dict[str, object]:
        media_type = f"{OCI}.manifest.v1+json"
        document = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": chance.choice(configs),
            "layers": chance.sample(base, BASE) + chance.sample(own, OWN),
            "annotations": {"org.opencontainers.image.version": f"{number}{platform}"},
        }
        return self.manifest("img", media_type, document)

    def manifest(
        self, folder: str, media_type: str, document: dict[str, object]
    ) -> dict[str, object]:
        raw = json.dumps(document, indent=2).encode()
        name = sha256(raw).hexdigest()
        self._write(self._root / folder, name, raw)
        return _descriptor(media_type, name, len(raw))

    def record(self, repository: Path, top: Mapping[str, object]) -> None:
        folder = self._root / "refs" / repository / "_manifests"
        self._write(folder, str(top["digest"]), _document(top))

    def tag(self, repository: Path, tag: str, top: dict[str, object]) -> None:
        record: dict[str, object] = {
            "descriptor": top,
            "resolved": "2026-09-21T08:00:00.000+00:00",
            "upstream": repository.parts[0],
        }
        self._write(self._root / "refs" / repository / "_tags", tag, _document(record))

    def _write(self, folder: Path, name: str, raw: bytes) -> None:
        if folder not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)
        file = os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(file, raw)
        os.utime(file, (USED, USED))
        os.close(file)


def _document(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.many", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--manifests", type=int, default=Many.manifests)
    parser.add_argument("--blobs", type=int, default=Many.blobs)
    options = parser.parse_args()
    make_store(options.folder, Many(options.manifests, options.blobs))
