"""Stored manifests: hashed when read, kept hot, and never served once they changed."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from ociproxy.errors import ManifestInvalid, StoreError
from ociproxy.oci.descriptor import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    UNKNOWN_MEDIA_TYPE,
    Descriptor,
)
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Repository
from ociproxy.store.manifests import check_manifest, with_media_type
from ociproxy.store.store import Store
from tests.images import Content, image, multi_platform

REPOSITORY = Repository("quay.io", "a/b")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def holder_of(content: Content) -> ManifestHolder:
    return ManifestHolder.of(content.data, content.media_type)


def publish(store: Store, holder: ManifestHolder) -> None:
    with store.publishing() as commit:
        store.manifests.put(holder, commit)
    commit.wait()


def commit(store: Store, content: Content) -> Digest:
    holder = holder_of(content)
    publish(store, holder)
    return holder.descriptor.digest


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_manifest_is_found_byte_for_byte(store: Store) -> None:
    made = image().top
    found = store.manifests.find(commit(store, made))
    assert found is not None
    assert found.raw == made.data
    assert (found.descriptor.media_type, found.descriptor.size) == (OCI_MANIFEST, made.size)


@pytest.mark.parametrize("docker", [False, True])
def test_indexes_lie_in_fat_and_images_in_img(store: Store, docker: bool) -> None:
    made = multi_platform(docker=docker)
    for each in made.all_manifests():
        commit(store, each)
    assert [path.name for path in (store.root / "fat").iterdir()] == [made.top.encoded]
    images = {path.name for path in (store.root / "img").iterdir()}
    assert images == {child.encoded for child in made.manifests}
    assert all(store.manifests.find(Digest.parse(c.digest)) for c in made.all_manifests())


def test_a_sha512_manifest_lies_under_its_own_name(store: Store) -> None:
    raw = image().top.data
    holder = ManifestHolder.of(raw, OCI_MANIFEST, algorithm="sha512")
    publish(store, holder)
    digest = holder.descriptor.digest
    assert (store.root / "img" / f"sha512-{digest.encoded}").read_bytes() == raw
    assert Store(store.root).manifests.find(digest) == holder
    assert store.manifests.find(Digest.of(raw)) is None


@pytest.mark.parametrize("hot", [True, False])
def test_a_flipped_byte_is_not_served_and_the_next_commit_repairs_it(
    store: Store, hot: bool
) -> None:
    made = image().top
    digest = commit(store, made)
    if hot:
        assert store.manifests.find(digest) is not None
    path = store.root / "img" / digest.encoded
    flip_byte(path)
    assert store.manifests.find(digest) is None
    commit(store, made)
    assert path.read_bytes() == made.data
    assert store.manifests.find(digest) is not None


@pytest.mark.parametrize("size", [0, 10])
def test_a_truncated_manifest_is_not_served(store: Store, size: int) -> None:
    digest = commit(store, image().top)
    os.truncate(store.root / "img" / digest.encoded, size)
    assert store.manifests.find(digest) is None


def test_what_another_process_adds_and_removes_is_seen_at_once(store: Store) -> None:
    made = image().top
    other = Store(store.root)
    digest = holder_of(made).descriptor.digest
    assert store.manifests.find(digest) is None
    commit(other, made)
    assert store.manifests.find(digest) is not None
    (store.root / "img" / digest.encoded).unlink()
    assert store.manifests.find(digest) is None
    assert other.manifests.find(digest) is None


def test_a_store_that_keeps_nothing_hot_serves_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", hot_manifests=0)
    digest = commit(store, image().top)
    assert store.manifests.find(digest) == store.manifests.find(digest) == holder_of(image().top)


def test_committing_again_leaves_the_file_alone(store: Store) -> None:
    made = image().top
    digest = commit(store, made)
    path = store.root / "img" / digest.encoded
    before = path.stat()
    commit(Store(store.root), made)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_last_use_is_recorded_unless_told_not_to(store: Store) -> None:
    digest = commit(store, image().top)
    path = store.root / "img" / digest.encoded
    long_ago = time.time() - 7 * 24 * 3600
    os.utime(path, (long_ago, path.stat().st_mtime))
    assert Store(store.root).manifests.find(digest, use=False) is not None
    # The kernel itself may move the atime of a file that is read, so only the path of use is sure.
    assert Store(store.root).manifests.find(digest) is not None
    assert store.manifests.last_used(digest) == pytest.approx(time.time(), abs=60)
    assert store.manifests.last_used(Digest.of(b"another")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_that_records_no_use_harms_no_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    digest = commit(store, image().top)
    blob = image().layers[0]
    (store.root / "blobs" / blob.encoded).write_bytes(blob.data)
    for path in store.root.glob("[bi]*/*"):
        os.utime(path, (1, path.stat().st_mtime))

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "utime", full)
    cold = Store(store.root)
    assert cold.manifests.find(digest) is not None
    store.blobs.verify(Digest.parse(blob.digest))
    found = store.blobs.find(Digest.parse(blob.digest))
    assert found is not None
    with found.file:
        assert found.sealed


def test_a_last_use_that_cannot_be_read_is_a_store_error(store: Store) -> None:
    digest = Digest.of(b"a link to itself")
    path = store.root / "img" / digest.encoded
    path.symlink_to(path)
    with pytest.raises(StoreError, match=digest.encoded):
        store.manifests.last_used(digest)


def test_the_media_type_is_the_records_where_it_says_more(store: Store) -> None:
    raw = b'{"schemaVersion": 2, "config": {}, "layers": []}'
    digest = commit(store, Content(OCI_MANIFEST, raw, str(Digest.of(raw))))
    found = store.manifests.find(digest)
    assert found is not None

    def shown_as(media_type: str) -> str:
        record = Descriptor(media_type, digest, len(raw))
        return with_media_type(found, record).descriptor.media_type

    assert found.descriptor.media_type == OCI_MANIFEST
    assert shown_as(DOCKER_MANIFEST) == DOCKER_MANIFEST
    assert shown_as(UNKNOWN_MEDIA_TYPE) == OCI_MANIFEST
    assert shown_as("application/octet-stream") == OCI_MANIFEST
    assert with_media_type(found, None) is found


@pytest.mark.parametrize(
    ("raw", "media_type"),
    [(b"[]", OCI_INDEX), (b"<html>", "text/html"), (b'{"layers": []}', OCI_INDEX)],
)
def test_what_is_no_manifest_does_not_enter_the_store(
    store: Store, raw: bytes, media_type: str
) -> None:
    holder = ManifestHolder.of(raw, media_type)
    with pytest.raises(ManifestInvalid, match=r"quay\.io"):
        check_manifest(holder, "quay.io")
    with pytest.raises(ManifestInvalid):
        store.commit_manifest(REPOSITORY, holder)
    assert store.manifests.find(holder.descriptor.digest) is None
    assert store.refs.find_manifest(REPOSITORY, holder.descriptor.digest) is None
