"""What an image in the store consists of, and what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ociproxy.oci.descriptor import DOCKER_SCHEMA1, OCI_INDEX, Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Repository
from ociproxy.store.image import ImageContents, read_contents
from ociproxy.store.store import Store
from tests.images import Content, Image, artifact, content, image, index, multi_platform

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Repository("quay.io", "a/b")
AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, made: Image) -> None:
    for blob in made.blobs:
        staged = store.staging.root / "staged"
        staged.write_bytes(blob.data)
        store.blobs.commit(staged, Digest.parse(blob.digest))
    for each in made.all_manifests():
        store.commit_manifest(REPOSITORY, ManifestHolder.of(each.data, each.media_type))


def walk(store: Store, made: Image, *platforms: Platform, referrers: bool = False) -> ImageContents:
    top = Descriptor(made.top.media_type, Digest.parse(made.digest), made.top.size)
    return read_contents(store, REPOSITORY, top, platforms, referrers=referrers)


def missing(found: ImageContents) -> list[str]:
    return sorted(str(each) for each in found.missing)


def remove(store: Store, *contents: Content) -> None:
    for each in contents:
        for folder in ("blobs", "img", "fat"):
            (store.root / folder / each.encoded).unlink(missing_ok=True)


@pytest.mark.parametrize("docker", [False, True])
def test_a_whole_index_reaches_everything_parents_first(store: Store, docker: bool) -> None:
    made = multi_platform(docker=docker, layers=2)
    put(store, made)
    found = walk(store, made)
    assert found.complete
    assert next(iter(found.manifests)) == Digest.parse(made.digest)
    reached = {str(each) for each in (*found.manifests, *found.blobs)}
    assert reached == {each.digest for each in made.all_content()}
    assert found.size == sum(each.size for each in made.all_content())
    assert list(map(str, found.platforms)) == ["linux/amd64", "linux/arm/v7", "linux/arm64"]


def test_a_child_that_nobody_stored_is_no_gap(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    remove(store, made.manifests[1])
    found = walk(store, made)
    assert found.complete
    assert ARM64 not in found.platforms


def test_a_child_of_a_wanted_platform_is_a_gap_where_it_is_not_stored(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    remove(store, made.manifests[1])
    found = walk(store, made, AMD64, ARM64)
    assert missing(found) == [made.manifests[1].digest]
    assert "linux/arm64 not stored" in str(next(iter(found.missing.values())))


def test_only_the_wanted_platforms_are_walked(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    found = walk(store, made, ARM64)
    assert found.complete
    assert found.platforms == (ARM64,)
    assert len(found.manifests) == len(found.blobs) == 2
    assert "nothing for linux/s390x" in str(
        list(walk(store, made, Platform("linux", "s390x")).missing.values())
    )


def test_an_index_without_any_child_stored_is_incomplete(store: Store) -> None:
    made = multi_platform()
    put(store, made)
    remove(store, *made.manifests)
    assert missing(walk(store, made)) == sorted(each.digest for each in made.manifests)


def test_an_empty_index_is_complete(store: Store) -> None:
    made = index({})
    put(store, made)
    assert walk(store, made).complete


def test_gaps_say_what_they_are(store: Store) -> None:
    made = image(layers=2)
    put(store, made)
    layer, other = made.layers
    remove(store, layer)
    (store.root / "blobs" / other.encoded).write_bytes(other.data[:-1])
    found = walk(store, made)
    assert {str(each.descriptor.digest): each.reason for each in found.missing.values()} == {
        layer.digest: "layer not stored",
        other.digest: f"layer {other.size - 1} bytes stored of {other.size}",
    }
    assert found.images[0].complete is False
    assert found.platforms == ()


def test_a_manifest_that_is_gone_is_missing(store: Store) -> None:
    found = walk(store, image())
    assert missing(found) == [image().digest]
    assert found.manifests == {}


def test_stored_attestations_come_with_their_image(store: Store) -> None:
    amd64, attested = image(), image("attestation")
    children = [
        amd64.top.descriptor(platform={"os": "linux", "architecture": "amd64"}),
        {
            **attested.top.descriptor(platform={"os": "unknown", "architecture": "unknown"}),
            "annotations": {"vnd.docker.reference.digest": amd64.digest},
        },
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}
    top = content(json.dumps(document).encode(), OCI_INDEX)
    made = Image(top, (amd64.top, attested.top), (*amd64.blobs, *attested.blobs))
    put(store, made)
    for platforms in ((), (AMD64,)):
        assert Digest.parse(attested.digest) in walk(store, made, *platforms).manifests
    remove(store, attested.top)
    for platforms in ((), (AMD64,)):
        found = walk(store, made, *platforms)
        assert found.complete
        assert Digest.parse(attested.digest) not in found.manifests


def test_referrers_come_where_asked_for_and_referrers_of_referrers_too(store: Store) -> None:
    made = image()
    sbom = artifact(made.top, data=b'{"sbom": 1}')
    signature = artifact(sbom.top, data=b'{"signature": 1}')
    for each in (made, sbom, signature):
        put(store, each)
    assert len(walk(store, made).manifests) == 1
    found = walk(store, made, referrers=True)
    assert [str(digest) for digest in found.referrers] == [sbom.digest, signature.digest]
    assert found.complete
    remove(store, signature.layers[0] if signature.layers else signature.blobs[1])
    assert missing(walk(store, made, referrers=True)) == [signature.blobs[1].digest]
    remove(store, signature.top)
    assert walk(store, made, referrers=True).complete


@pytest.mark.parametrize("make", [image, multi_platform])
def test_an_image_that_is_called_something_else_is_not_complete(
    store: Store, make: Callable[[], Image]
) -> None:
    """As an unknown document it would be, without its layers."""
    made = make()
    put(store, made)
    top = Descriptor("application/unknown+json", Digest.parse(made.digest), made.top.size)
    found = read_contents(store, REPOSITORY, top, (), referrers=False)
    assert missing(found) == [made.digest]


def test_a_document_of_another_kind_is_complete_by_itself(store: Store) -> None:
    raw = b'{"mediaType": ["not", "a", "text"]}'
    holder = ManifestHolder.of(raw, "application/unknown+json")
    store.commit_manifest(REPOSITORY, holder)
    assert read_contents(store, REPOSITORY, holder.descriptor, (), referrers=False).complete


def test_a_manifest_of_dockers_schema_1_is_not_called_complete(store: Store) -> None:
    document = {"schemaVersion": 1, "fsLayers": [{"blobSum": f"sha256:{'a' * 64}"}]}
    made = Image(content(json.dumps(document).encode(), DOCKER_SCHEMA1))
    put(store, made)
    assert missing(walk(store, made)) == [made.digest]
