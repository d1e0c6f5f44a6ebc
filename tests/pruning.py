"""A store whose content has ages, and `ociproxy prune` on it, as a process."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Reference
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests import forked
from tests.images import Content, Image, image_of, layer, random_bytes
from tests.server import ROOT
from tests.stores import put, record_tag, stored

DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    stdout: str
    stderr: str

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.stdout.splitlines()]
        return [event for event in found if event["event"] == name]

    @property
    def images(self) -> list[str]:
        """The references that were removed, in order."""
        found = [each for each in self.events("image") if each["status"] == "removed"]
        return [each["reference"] for each in found]

    @property
    def content(self) -> list[tuple[str, str, int]]:
        return [(e["kind"], e["digest"], e["size"]) for e in self.events("content")]

    @property
    def summary(self) -> dict[str, Any]:
        [done] = self.events("done")
        return done


def command(store: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ociproxy", *words, "--image-path", str(store)]


def run(store: Path, *words: str, code: int = 0) -> Done:
    done = forked.run(
        command(store, *words), capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return Done(done.returncode, done.stdout, done.stderr)


def prune(store: Path, *words: str, code: int = 0) -> Done:
    return run(store, "prune", "--json", *words, code=code)


def put_aged(store: Store, reference: str, made: Image, days: float) -> None:
    """An image that was stored and used last so many days ago."""
    put(store, reference, made)
    for each in made.all_content():
        age(store, each, days)


def write(store: Store, reference: str, made: Image) -> None:
    """An image, while other processes may remove what no process has locked."""
    parsed = Reference.parse(reference)
    with store.blob_writer() as writer:
        for each in made.blobs:
            writer.write(io.BytesIO(each.data), each.size, Digest.parse(each.digest))
    for each in made.all_manifests():
        holder = ManifestHolder.of(each.data, each.media_type)
        store.commit_manifest(parsed.repository, holder)
        if parsed.tag is not None and each.digest == made.digest:
            record_tag(store, parsed.repository, parsed.tag, holder.descriptor, now=time.time())


def age(store: Store, each: Content, days: float) -> None:
    path, when = stored(store, each), int((time.time() - days * DAY) * 10**9)
    os.utime(path, ns=(when, when))
    if path.parent.name == "blobs":
        store.blobs.verify(Digest.parse(each.digest))  # its time was its seal
        os.utime(path, ns=(when, path.stat().st_mtime_ns))


def sharing(*names: str, size: int = 2000) -> list[Image]:
    """Images of two layers, of which they share the first."""
    base = layer({"base": random_bytes(size, seed="base")})
    return [image_of([base, layer({n: random_bytes(size, seed=n)})], command=[n]) for n in names]


def listed(store: Path) -> dict[str, bool]:
    """The references, and whether each image is complete."""
    return {str(entry.reference): entry.complete for entry in inventory(Store(store))}


def content_files(store: Path) -> set[str]:
    return {each.name for name in ("blobs", "img", "fat") for each in (store / name).iterdir()}


def names_of(*images: Image) -> set[str]:
    return {each.encoded for made in images for each in made.all_content()}
