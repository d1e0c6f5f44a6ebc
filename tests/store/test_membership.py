"""Which blobs a repository's manifests refer to, as the files say now."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Repository
from ociproxy.store import membership
from ociproxy.store.membership import Membership
from ociproxy.store.store import Store
from tests.images import OCI_LAYER, OCI_MANIFEST, Content, Image, image, random_blob

ONE, TWO = Repository("quay.io", "a/one"), Repository("quay.io", "a/two")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def members(store: Store) -> Membership:
    return Membership(store.refs, store.manifests)


def commit(store: Store, repository: Repository, held: Image) -> list[Digest]:
    """Its manifest; the blobs it refers to."""
    holder = ManifestHolder.of(held.top.data, held.top.media_type)
    store.commit_manifest(repository, holder)
    return [digest(blob) for blob in held.blobs]


def digest(content: Content) -> Digest:
    return Digest.parse(content.digest)


def settle(store: Store, repository: Repository) -> Path:
    """As if nothing had been written lately."""
    folder = store.root / "refs" / repository.registry / repository.name / "_manifests"
    then = time.time() - 10
    os.utime(folder, (then, then))
    return folder


def test_each_repository_has_its_own(store: Store, members: Membership) -> None:
    one, two = commit(store, ONE, image("one")), commit(store, TWO, image("two"))
    for blob in one:
        assert members.read(ONE, blob)
        assert not members.read(TWO, blob)
    assert all(members.read(TWO, blob) for blob in two)
    assert not members.read(Repository("quay.io", "a/none"), one[0])


def test_memory_answers_as_long_as_nothing_changed(store: Store, members: Membership) -> None:
    one = commit(store, ONE, image("one"))
    settle(store, ONE)
    assert members.refers(ONE, one[0]) is None
    assert members.read(ONE, one[0])
    assert members.refers(ONE, one[0]) is True
    assert members.refers(ONE, digest(random_blob(10))) is False
    other = commit(store, ONE, image("other"))
    assert members.refers(ONE, other[0]) is None
    assert all(members.read(ONE, blob) for blob in (*one, *other))


def test_a_folder_that_was_just_written_is_looked_at_again(
    store: Store, members: Membership
) -> None:
    one = commit(store, ONE, image("one"))
    assert members.read(ONE, one[0])
    assert members.refers(ONE, one[0]) is None


def test_what_another_process_removes_is_forgotten(store: Store, members: Membership) -> None:
    one, other = image("one"), image("other")
    for each in (one, other):
        commit(store, ONE, each)
    folder = settle(store, ONE)
    assert members.read(ONE, digest(one.blobs[0]))
    (folder / one.digest).unlink()
    assert not members.read(ONE, digest(one.blobs[0]))
    assert members.read(ONE, digest(other.blobs[0]))


def test_a_damaged_manifest_refers_to_nothing_until_it_is_mended(
    store: Store, members: Membership
) -> None:
    one = image("one")
    blobs = commit(store, ONE, one)
    settle(store, ONE)
    (store.root / "img" / one.top.encoded).write_bytes(b"{}")
    assert not members.read(ONE, blobs[0])
    (store.root / "img" / one.top.encoded).write_bytes(one.top.data)
    assert members.read(ONE, blobs[0])


def test_no_more_is_read_than_answers_the_question(store: Store, members: Membership) -> None:
    blobs = [commit(store, ONE, image(str(number))) for number in range(3)]
    folder = settle(store, ONE)
    for number in range(3):
        os.utime(folder / image(str(number)).digest, (number, number))
    assert members.read(ONE, blobs[2][0])
    assert members.refers(ONE, blobs[2][1]) is True
    assert members.refers(ONE, blobs[0][0]) is None
    assert members.read(ONE, blobs[0][0])
    assert members.refers(ONE, digest(random_blob(10))) is False


@pytest.mark.parametrize(
    ("document", "refers"),
    [
        ({"layers": [{"digest": "D"}]}, True),
        ({"blobs": [{"digest": "D"}]}, True),
        ({"config": {"digest": "D"}}, True),
        ({"schemaVersion": 1, "fsLayers": [{"blobSum": "D"}]}, True),
        ({"layers": [{"digest": "D", "urls": ["https://elsewhere.example/"]}]}, False),
        ({"manifests": [{"mediaType": OCI_LAYER, "digest": "D"}]}, True),
        ({"manifests": [{"mediaType": OCI_MANIFEST, "digest": "D"}]}, False),
        ({"subject": {"digest": "D"}}, False),
        ({"layers": "D", "blobs": [None, "D", {"digest": 5}, {"digest": "sha256:zz"}]}, False),
    ],
)
def test_what_is_a_reference(
    store: Store, members: Membership, document: dict[str, object], refers: bool
) -> None:
    blob = digest(random_blob(10))
    raw = json.dumps(document).replace('"D"', f'"{blob}"').encode()
    holder = ManifestHolder.of(raw, "application/x.other+json")
    with store.publishing() as commit:
        store.manifests.put(holder, commit)
    commit.wait()
    store.refs.put_manifest(ONE, holder.descriptor)
    assert members.read(ONE, blob) is refers


def test_what_memory_holds_is_bounded_and_the_newest_is_there(
    store: Store, members: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_MOST_OF_ONE", 4)
    old = commit(store, ONE, image("old"))
    folder = settle(store, ONE)
    for each in folder.iterdir():
        os.utime(each, (1, 1))
    new = [commit(store, ONE, image(str(number))) for number in range(3)]
    found = [members.read(ONE, blob) for blobs in new for blob in blobs]
    assert any(found)
    assert not members.read(ONE, old[0])
    assert len(members._known) == 1
