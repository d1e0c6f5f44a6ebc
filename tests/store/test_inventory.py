"""What is cached, as the files say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Repository
from ociproxy.store.inventory import Entry, inventory
from ociproxy.store.look import Look
from ociproxy.store.refs import TagRecord
from ociproxy.store.store import Store
from tests.images import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Content,
    Image,
    artifact,
    content,
    image,
    multi_platform,
)
from tests.stores import stored

REPOSITORY = Repository("quay.io", "a/b")
RESOLVED = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put_blob(store: Store, blob: Content) -> None:
    staged = store.staging.root / "staged"
    staged.write_bytes(blob.data)
    store.blobs.commit(staged, Digest.parse(blob.digest))


def put_tag(store: Store, tag: str, top: Content) -> None:
    descriptor = Descriptor(top.media_type, Digest.parse(top.digest), top.size)
    store.refs.put_tag(REPOSITORY, tag, TagRecord(descriptor, RESOLVED, "quay.io"))


def put(store: Store, made: Image, tag: str = "latest") -> None:
    for blob in made.blobs:
        put_blob(store, blob)
    for each in made.all_manifests():
        store.commit_manifest(REPOSITORY, ManifestHolder.of(each.data, each.media_type))
    put_tag(store, tag, made.top)


def only(store: Store) -> Entry:
    [entry] = inventory(store)
    return entry


def test_an_empty_store_has_no_entries(store: Store) -> None:
    assert list(inventory(store)) == []


@pytest.mark.parametrize("docker", [False, True])
def test_a_whole_index_is_complete_and_counts_each_byte_once(store: Store, docker: bool) -> None:
    made = multi_platform(docker=docker)
    put(store, made)
    entry = only(store)
    assert str(entry.reference) == "quay.io/a/b:latest"
    assert (str(entry.digest), entry.resolved) == (made.digest, RESOLVED)
    platforms = [(str(each.platform or ""), each.complete) for each in entry.images]
    assert platforms == [("linux/amd64", True), ("linux/arm64", True), ("linux/arm/v7", True)]
    assert entry.complete
    assert entry.size == sum(each.size for each in made.all_content())
    assert entry.last_used is not None


def test_a_missing_layer_makes_its_platform_incomplete(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    gone = made.layers[0]
    (store.root / "blobs" / gone.encoded).unlink()
    entry = only(store)
    assert [each.complete for each in entry.images] == [False, True, True]
    assert not entry.complete
    assert entry.size == sum(each.size for each in made.all_content()) - gone.size


def test_a_platform_nobody_pulled_is_not_listed(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    (store.root / "img" / made.manifests[1].encoded).unlink()
    entry = only(store)
    assert [str(each.platform) for each in entry.images] == ["linux/amd64", "linux/arm/v7"]
    assert entry.complete


def test_a_tag_whose_manifest_is_gone_is_incomplete_and_unused(store: Store) -> None:
    put_tag(store, "latest", image().top)
    entry = only(store)
    assert (entry.images, entry.size, entry.last_used) == ((), 0, None)
    assert not entry.complete


def test_a_single_image_says_its_platform_in_its_config(store: Store) -> None:
    put(store, image(platform="linux/arm/v7"))
    assert [str(each.platform) for each in only(store).images] == ["linux/arm/v7"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"os": 1, "architecture": "amd64"}',
        b'{"os": "linux", "architecture": "arm", "variant": ["v7"]}',
        b'{"os": "linux", "architecture": null}',
    ],
)
def test_a_config_that_says_nothing_gives_no_platform(store: Store, data: bytes) -> None:
    config = content(data, OCI_CONFIG)
    document = {"schemaVersion": 2, "config": config.descriptor(), "layers": []}
    top = content(json.dumps(document).encode(), OCI_MANIFEST)
    put(store, Image(top, blobs=(config,)))
    entry = only(store)
    assert [(str(each.platform or ""), each.complete) for each in entry.images] == [("", True)]


def test_any_other_manifest_is_complete_by_itself(store: Store) -> None:
    put(store, Image(content(b'{"any": 1}', "application/vnd.example+json")))
    entry = only(store)
    assert [(str(each.platform or ""), each.complete) for each in entry.images] == [("", True)]


def test_tags_are_listed_in_order(store: Store) -> None:
    for tag in ("b", "B", "a"):
        put(store, image(), tag)
    assert [entry.reference.tag for entry in inventory(store)] == ["B", "a", "b"]


def test_an_image_without_a_tag_is_listed_by_digest(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    (store.root / "refs/quay.io/a/b/_tags/latest").unlink()
    entry = only(store)
    assert str(entry.reference) == f"quay.io/a/b@{made.digest}"
    assert entry.complete
    assert entry.resolved is None
    assert len(entry.images) == 3


def test_what_a_tag_or_another_manifest_leads_to_is_not_listed_again(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    put(store, artifact(made.top), "unused")
    (store.root / "refs/quay.io/a/b/_tags/unused").unlink()
    assert only(store).reference.tag == "latest"


def test_what_a_moved_tag_left_is_listed_by_digest(store: Store) -> None:
    old, new = image("old"), image("new")
    put(store, old)
    put(store, new)
    assert [str(entry.reference) for entry in inventory(store)] == [
        "quay.io/a/b:latest",
        f"quay.io/a/b@{old.digest}",
    ]


def test_an_image_was_last_used_when_any_part_of_it_was(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    files = [stored(store, each) for each in made.all_content()]
    for number, file in enumerate(files):
        os.utime(file, ns=(int(RESOLVED) * 10**9, file.stat().st_mtime_ns))
        assert only(store).last_used == RESOLVED or number < len(files) - 1
    later = RESOLVED + 1000
    for file in files:
        os.utime(file, ns=(int(later) * 10**9, file.stat().st_mtime_ns))
        assert only(store).last_used == later
        os.utime(file, ns=(int(RESOLVED) * 10**9, file.stat().st_mtime_ns))


def test_use_of_a_signature_is_use_of_the_image(store: Store) -> None:
    made = image()
    put(store, made)
    signature = content(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": made.blobs[0].descriptor(),
                "layers": [],
                "subject": made.top.descriptor(),
            }
        ).encode(),
        OCI_MANIFEST,
    )
    store.commit_manifest(REPOSITORY, ManifestHolder.of(signature.data, OCI_MANIFEST))
    for each in (*made.all_content(), signature):
        file = stored(store, each)
        used = RESOLVED + 1000 if each is signature else RESOLVED
        os.utime(file, ns=(int(used) * 10**9, file.stat().st_mtime_ns))
    assert only(store).last_used == RESOLVED + 1000


def test_a_look_reads_each_manifest_and_the_size_of_each_blob_once(store: Store) -> None:
    made = image()
    put(store, made)
    look = Look(store)
    top = Descriptor(made.top.media_type, Digest.parse(made.digest), made.top.size)
    seen, blob = look.manifest(top), Digest.parse(made.blobs[0].digest)
    size = look.blob(blob)
    for each in made.all_content():
        stored(store, each).unlink()
    assert look.manifest(top) is seen is not None
    assert look.blob(blob) == size is not None
    assert Look(store).manifest(top) is None
    assert Look(store).blob(blob) is None
