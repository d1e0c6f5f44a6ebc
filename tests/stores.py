"""Filling a store in a test through the product's own write path, without an upstream."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.refs import TagRecord
from ociproxy.store.store import Store
from tests.images import Content, Image


def put(store: Store, reference: str, made: Image, *, resolved: float = 1_800_000_000.0) -> None:
    """An image with everything it refers to, and its tag if the reference has one."""
    parsed = Reference.parse(reference)
    for blob in made.blobs:
        staged = store.staging.root / "staged"
        staged.write_bytes(blob.data)
        store.blobs.commit(staged, Digest.parse(blob.digest))
    for each in made.all_manifests():
        holder = ManifestHolder.of(
            each.data, each.media_type, algorithm=each.digest.partition(":")[0]
        )
        store.commit_manifest(parsed.repository, holder)
    if parsed.tag is not None:
        top = Descriptor(made.top.media_type, Digest.parse(made.digest), made.top.size)
        record = TagRecord(top, resolved, parsed.repository.registry)
        store.refs.put_tag(parsed.repository, parsed.tag, record)


def record_tag(
    store: Store, repository: Repository, tag: str, descriptor: Descriptor, *, now: float
) -> None:
    """What a tag means from `now` on."""
    with store.publishing() as commit:
        store.put_tag(repository, tag, descriptor, commit, now=now)
    commit.wait()


def stored(store: Store, content: Content) -> Path:
    """Where the store has it."""
    for folder in ("blobs", "img", "fat"):
        path = store.root / folder / content.encoded
        if path.exists():
            return path
    raise AssertionError(f"{content.digest} is not stored")


def damage(path: Path, position: int = 0) -> None:
    """Flip one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def promised_to_a_killed_process(store: Store, size: int) -> None:
    """Room that a process has been promised, and neither used nor given back."""

    def work() -> None:
        assert store.usage.reserve(size, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
