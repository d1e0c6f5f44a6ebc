"""Tools that read image archives: what each makes of one, image by image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.images import Image
from tests.parts.clients import Podman, Skopeo
from tests.parts.containerd import Containerd
from tests.parts.tools import require_tool, run

KEPT, NEW, REFUSED = "kept", "new digests", "refused"

Images = dict[str, Image]


def with_skopeo(archive: Path, images: Images, folder: Path) -> Iterable[str]:
    skopeo = Skopeo(folder / "settings")
    for number, (name, made) in enumerate(images.items()):
        target = folder / str(number)
        try:
            skopeo.copy_to(f"oci-archive:{archive}:{name}", f"dir:{target}")
        except AssertionError:
            yield REFUSED
            continue
        yield verdict(sha256((target / "manifest.json").read_bytes()), made)


def with_podman(archive: Path, images: Images, folder: Path) -> Iterable[str]:
    podman = Podman(folder)
    try:
        podman.load(archive)
    except AssertionError:
        yield REFUSED
        return
    for name, made in images.items():
        yield verdict(podman.digest(name), made)


def with_containerd(archive: Path, images: Images, folder: Path) -> Iterable[str]:
    with Containerd() as containerd:
        try:
            containerd.ctr("images", "import", str(archive))
        except AssertionError:
            yield REFUSED
            return
        found = containerd.images()
        for name, made in images.items():
            yield verdict(found[name], made)


def with_umoci(archive: Path, images: Images, folder: Path) -> Iterable[str]:
    program = require_tool("umoci")
    layout = folder / "layout"
    layout.mkdir()
    run("tar", "--extract", "--file", archive, "--directory", layout)
    for number, (name, made) in enumerate(images.items()):
        bundle = folder / str(number)
        words: list[str | Path] = [
            program,
            "unpack",
            "--rootless",
            "--image",
            f"{layout}:{name}",
            bundle,
        ]
        if run(*words, check=False).returncode:
            yield REFUSED
            continue
        state = json.loads((bundle / "umoci.json").read_text(encoding="utf-8"))
        digest: str = state["from_descriptor_path"]["descriptor_walk"][-1]["digest"]
        yield verdict(digest, made)


READERS: dict[str, Callable[[Path, Images, Path], Iterable[str]]] = {
    "`skopeo copy oci-archive:`": with_skopeo,
    "`ctr images import`": with_containerd,
    "`podman load`": with_podman,
    "`umoci unpack`, of the unpacked tar": with_umoci,
}


def verdict(digest: str, made: Image) -> str:
    """Tools for one platform go by that one's manifest, others by the index."""
    known = {made.digest, *(each.digest for each in made.manifests)}
    return KEPT if digest in known else NEW


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
