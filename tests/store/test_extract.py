"""The Extractor: what is whole gets published, whatever comes beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import LayoutDirectory
from ociproxy.oci.reference import Repository
from ociproxy.store.examined import Examined
from ociproxy.store.extract import Extractor
from ociproxy.store.store import Store
from tests import images, layouts
from tests.images import Content, Image

REPOSITORY = Repository.parse("quay.io", "a/b")
IMAGE = images.image(layers=2, layer_size=5_000_000)
MULTI = images.multi_platform()
KINDS = {
    "image": IMAGE,
    "index": MULTI,
    "docker": images.image("docker", docker=True),
    "list": images.multi_platform("docker", docker=True),
    "artifact": images.artifact(IMAGE.top),
}
NESTED = images.index({"linux/amd64": MULTI})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def extractor(store: Store) -> Iterator[Extractor]:
    with Extractor(store) as extractor:
        yield extractor


def descriptor(content: Content) -> Descriptor:
    return Descriptor(content.media_type, Digest.parse(content.digest), content.size)


def take(extractor: Extractor, content: Content, data: bytes | None = None) -> bool:
    data = content.data if data is None else data
    return extractor.take(Digest.parse(content.digest), len(data), io.BytesIO(data))


def take_all(extractor: Extractor, image: Image, *without: Content) -> None:
    for content in image.all_content():
        if content not in without:
            take(extractor, content)


def examine(extractor: Extractor, image: Image, *, sparse: bool = True) -> Examined:
    extractor.drain()
    return extractor.examine(descriptor(image.top), REPOSITORY, sparse=sparse)


def problems(examined: Examined) -> list[str]:
    return sorted(str(problem) for problem in examined.problems)


@pytest.mark.parametrize("image", [*KINDS.values(), NESTED], ids=[*KINDS, "nested"])
@pytest.mark.parametrize("backwards", [False, True])
def test_an_image_is_published_whatever_the_order(
    store: Store, extractor: Extractor, image: Image, backwards: bool
) -> None:
    content = [*image.all_content(), *MULTI.all_content()]
    for each in reversed(content) if backwards else content:
        take(extractor, each)
    examined = examine(extractor, image)
    assert problems(examined) == []
    extractor.publish(REPOSITORY, examined, "1")
    record = store.refs.find_tag(REPOSITORY, "1")
    assert record is not None
    assert str(record.descriptor.digest) == image.digest
    for each in image.all_manifests():
        holder = store.manifests.find(Digest.parse(each.digest))
        assert holder is not None
        assert holder.raw == each.data
        assert store.refs.find_manifest(REPOSITORY, holder.descriptor.digest)
    for each in image.blobs:
        assert store.blobs.path(Digest.parse(each.digest)).read_bytes() == each.data
    stored = {each.name for each in (store.root / "blobs").iterdir()}
    assert stored == {each.encoded for each in image.blobs} | {
        each.encoded for each in MULTI.blobs if each.media_type == images.OCI_LAYER
    }


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS)
def test_a_folder_is_taken_in_as_far_as_the_image_reaches(
    tmp_path: Path, store: Store, extractor: Extractor, image: Image
) -> None:
    other = images.image("other")
    files = layouts.members({"a": image, "b": other})
    layout = LayoutDirectory(layouts.write_folder(tmp_path / "layout", files))
    extractor.take_layout(layout, descriptor(image.top))
    extractor.publish(REPOSITORY, examine(extractor, image), "1")
    stored = {each.name for each in (store.root / "blobs").iterdir()}
    assert stored == {each.encoded for each in image.blobs}


@pytest.mark.parametrize("which", range(3))
def test_a_missing_blob_is_named(extractor: Extractor, which: int) -> None:
    take_all(extractor, IMAGE, IMAGE.blobs[which])
    what = "layer" if which else "config"
    assert problems(examine(extractor, IMAGE)) == [
        f"{what} {IMAGE.blobs[which].digest}: neither here nor in the store"
    ]


def test_a_damaged_blob_is_named_and_not_stored(store: Store, extractor: Extractor) -> None:
    take_all(extractor, IMAGE)
    other = images.image("other", layer_size=5_000_000)
    take_all(extractor, other, other.layers[0])
    data = bytearray(other.layers[0].data)
    data[-1] ^= 1
    take(extractor, other.layers[0], bytes(data))
    (problem,) = problems(examine(extractor, other))
    assert problem.startswith(f"layer {other.layers[0].digest}: expected digest")
    assert store.blobs.find_size(Digest.parse(other.layers[0].digest)) is None
    assert examine(extractor, IMAGE).complete


def test_a_second_copy_mends_a_damaged_one(extractor: Extractor) -> None:
    take_all(extractor, IMAGE, IMAGE.layers[0])
    take(extractor, IMAGE.layers[0], b"short")
    assert not examine(extractor, IMAGE).complete
    assert take(extractor, IMAGE.layers[0])
    assert examine(extractor, IMAGE).complete


def test_what_is_stored_is_not_read_again(extractor: Extractor) -> None:
    take_all(extractor, MULTI)
    extractor.publish(REPOSITORY, examine(extractor, MULTI))
    assert not any(take(extractor, content, b"") for content in MULTI.all_content())


def test_a_rotten_stored_blob_is_replaced(store: Store, extractor: Extractor) -> None:
    take_all(extractor, IMAGE)
    extractor.publish(REPOSITORY, examine(extractor, IMAGE))
    path = store.blobs.path(Digest.parse(IMAGE.layers[0].digest))
    path.write_bytes(b"rot")
    assert take(extractor, IMAGE.layers[0])
    assert examine(extractor, IMAGE).complete
    assert path.read_bytes() == IMAGE.layers[0].data


def test_a_rotten_blob_of_the_base_is_no_base(store: Store, extractor: Extractor) -> None:
    take_all(extractor, IMAGE)
    extractor.drain()
    store.blobs.path(Digest.parse(IMAGE.layers[0].digest)).write_bytes(bytes(IMAGE.layers[0].size))
    assert problems(examine(extractor, IMAGE)) == [
        f"layer {IMAGE.layers[0].digest}: neither here nor in the store"
    ]


def test_an_index_may_be_sparse(store: Store, extractor: Extractor) -> None:
    arm64 = MULTI.manifests[1]
    take_all(extractor, MULTI, arm64)
    examined = examine(extractor, MULTI)
    assert problems(examined) == []
    assert [str(each.digest) for each in examined.left_out] == [arm64.digest]
    extractor.publish(REPOSITORY, examined, "1")
    assert store.manifests.find(Digest.parse(arm64.digest)) is None


def test_a_platform_without_its_layers_is_left_out(store: Store, extractor: Extractor) -> None:
    arm64 = MULTI.manifests[1]
    layer = arm64.json()["layers"][0]["digest"]
    take_all(extractor, MULTI, *(blob for blob in MULTI.blobs if blob.digest == layer))
    examined = examine(extractor, MULTI)
    assert [str(each.digest) for each in examined.left_out] == [arm64.digest]
    extractor.publish(REPOSITORY, examined, "1")
    assert store.manifests.find(Digest.parse(arm64.digest)) is None


def test_after_a_cut_nothing_may_be_left_out(extractor: Extractor) -> None:
    take_all(extractor, MULTI, MULTI.manifests[1])
    assert not examine(extractor, MULTI, sparse=False).complete


def test_a_damaged_platform_is_not_taken_for_one_that_was_not_sent(extractor: Extractor) -> None:
    take_all(extractor, MULTI, MULTI.manifests[1])
    take(extractor, MULTI.manifests[1], MULTI.manifests[1].data[:-1])
    assert not examine(extractor, MULTI).complete


def test_an_index_with_no_platform_is_incomplete(extractor: Extractor) -> None:
    take_all(extractor, MULTI, *MULTI.manifests)
    assert len(problems(examine(extractor, MULTI))) == 3


def test_a_manifest_has_to_be_what_it_is_called(extractor: Extractor) -> None:
    take_all(extractor, MULTI)
    extractor.drain()
    lie = Descriptor(images.OCI_MANIFEST, Digest.parse(MULTI.digest), MULTI.top.size)
    (problem,) = problems(extractor.examine(lie, REPOSITORY))
    assert "described as" in problem
    wrong_size = Descriptor(images.OCI_INDEX, Digest.parse(MULTI.digest), MULTI.top.size + 1)
    (problem,) = problems(extractor.examine(wrong_size, REPOSITORY))
    assert "expected size" in problem


def test_a_size_that_the_manifest_has_wrong_is_damage(extractor: Extractor) -> None:
    manifest = IMAGE.top.json()
    manifest["layers"][0]["size"] += 1
    lying = Image(images._json(manifest, images.OCI_MANIFEST), blobs=IMAGE.blobs)
    take_all(extractor, lying)
    (problem,) = problems(examine(extractor, lying))
    assert f"says {manifest['layers'][0]['size']} bytes" in problem


def test_indexes_do_not_nest_without_end(extractor: Extractor) -> None:
    image = IMAGE
    take_all(extractor, image)
    for _ in range(12):
        image = images.index({"linux/amd64": image})
        take(extractor, image.top)
    (problem,) = problems(examine(extractor, image))
    assert "nested too deep" in problem


def test_a_referrer_is_found_from_its_subject(store: Store, extractor: Extractor) -> None:
    sbom = images.artifact(IMAGE.top)
    for image in (IMAGE, sbom):
        take_all(extractor, image)
        extractor.publish(REPOSITORY, examine(extractor, image))
    (referrer,) = store.refs.referrers(REPOSITORY, Digest.parse(IMAGE.digest))
    assert str(referrer.digest) == sbom.digest
