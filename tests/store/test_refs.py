"""Records of tags, manifests and referrers, for every name an upstream may use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import OCI_INDEX, OCI_MANIFEST, Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Repository
from ociproxy.store.inventory import references
from ociproxy.store.refs import REFERRERS_OF_ONE, TagRecord
from ociproxy.store.store import Store
from tests.images import Content, artifact, image

NAMES = ["a", "Mixed/Case", "dotted.name/x.y", "a/b/c/d/e/f", "a__b/c--d", "tags/list", "v2/blobs"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def record(text: str, *, resolved: float = 1_800_000_000.125) -> TagRecord:
    raw = text.encode()
    return TagRecord(Descriptor(OCI_INDEX, Digest.of(raw), len(raw)), resolved, "quay.io")


def holder_of(content: Content) -> ManifestHolder:
    return ManifestHolder.of(content.data, content.media_type)


@pytest.mark.parametrize("registry", ["quay.io", "localhost:5000", "[::1]:5000", "docker.io"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tag", ["latest", "V1.2-Alpha_3", "_", "_tags", "1." + "x" * 126])
def test_a_tag_is_found_as_it_was_put(store: Store, registry: str, name: str, tag: str) -> None:
    repository = Repository.parse(registry, name)
    assert store.refs.find_tag(repository, tag) is None
    store.refs.put_tag(repository, tag, record("one"))
    for each in (store, Store(store.root)):
        assert each.refs.find_tag(repository, tag) == record("one")
        assert each.refs.tags(repository) == [tag]
        assert each.refs.has_repository(repository)


def test_tags_that_differ_in_case_are_two(store: Store) -> None:
    repository = Repository("quay.io", "a/b")
    store.refs.put_tag(repository, "Latest", record("one"))
    store.refs.put_tag(repository, "latest", record("two"))
    assert store.refs.find_tag(repository, "Latest") == record("one")
    assert store.refs.find_tag(repository, "latest") == record("two")
    assert store.refs.tags(repository) == ["Latest", "latest"]


def test_a_repository_inside_another_has_its_own_tags(store: Store) -> None:
    outer, inner = Repository("quay.io", "a"), Repository("quay.io", "a/b")
    store.refs.put_tag(inner, "x", record("one"))
    assert store.refs.tags(outer) == []
    store.refs.put_tag(outer, "y", record("two"))
    assert store.refs.tags(outer) == ["y"]
    assert store.refs.tags(inner) == ["x"]


def test_the_last_writer_of_a_tag_wins_and_everybody_sees_it(store: Store) -> None:
    repository, other = Repository("quay.io", "a/b"), Store(store.root)
    store.refs.put_tag(repository, "x", record("one"))
    assert other.refs.find_tag(repository, "x") == record("one")
    store.refs.put_tag(repository, "x", record("two"))
    left = (record("one").descriptor.digest,)
    assert other.refs.find_tag(repository, "x") == replace(record("two"), left=left)


def test_a_manifest_belongs_to_the_repository_that_has_it(store: Store) -> None:
    here, there = Repository("quay.io", "a/b"), Repository("quay.io", "a/c")
    descriptor = Descriptor(
        OCI_MANIFEST, Digest.of(b"x", "sha512"), 1, platform=Platform("linux", "arm", "v7")
    )
    store.refs.put_manifest(here, descriptor)
    assert Store(store.root).refs.find_manifest(here, descriptor.digest) == descriptor
    assert store.refs.find_manifest(there, descriptor.digest) is None
    assert not store.refs.has_repository(there)


def test_a_walk_goes_through_all_tags_in_order(store: Store) -> None:
    wanted = [
        ("docker.io", "library/nginx", "1.27"),
        ("docker.io", "library/nginx", "latest"),
        ("localhost:5000", "a/b/c/d/e/f", "x"),
        ("quay.io", "Mixed/Case", "V1"),
        ("quay.io", "a", "y"),
        ("quay.io", "a/b", "x"),
    ]
    for registry, name, tag in reversed(wanted):
        store.refs.put_tag(Repository(registry, name), tag, record(name))
    walked = [
        (repository.registry, repository.name, tag)
        for repository in store.refs.repositories()
        for tag in store.refs.tags(repository)
    ]
    assert walked == wanted
    for registry, name, tag in walked:
        assert store.refs.find_tag(Repository(registry, name), tag) == record(name)


def test_a_walk_passes_by_what_is_no_record(store: Store) -> None:
    repository = Repository("quay.io", "a")
    store.refs.put_tag(repository, "good", record("one"))
    tags = store.root / "refs" / "quay.io" / "a" / "_tags"
    for name, text in [("empty", ""), ("html", "<html>"), ("list", "[]"), ("object", "{}")]:
        (tags / name).write_text(text)
    (tags / "time").write_text((tags / "good").read_text().replace("T", " at "))
    for stray in ("refs/_tags", "refs/quay.io/_tags", "refs/not a registry/a/_tags"):
        (store.root / stray).mkdir(parents=True)
        (store.root / stray / "x").write_text((tags / "good").read_text())
    assert list(store.refs.repositories()) == [repository]
    assert [ref.tag for ref, _, _ in references(store)] == ["good"]
    assert store.refs.find_tag(repository, "html") is None


def test_a_repository_lists_the_referrers_it_has_and_no_others(store: Store) -> None:
    here, there = Repository("quay.io", "a/b"), Repository("quay.io", "a/c")
    subject = image().top
    made = [artifact(subject, data=data).top for data in (b"1", b"2", b"3")]
    store.commit_manifest(here, holder_of(subject))
    store.commit_manifest(here, holder_of(made[0]))
    store.commit_manifest(here, holder_of(made[1]))
    store.commit_manifest(there, holder_of(made[2]))
    digest = Digest.parse(subject.digest)
    for each in (store, Store(store.root)):
        found = [str(d.digest) for d in each.refs.referrers(here, digest)]
        assert found == sorted(c.digest for c in made[:2])
        assert [str(d.digest) for d in each.refs.referrers(there, digest)] == [made[2].digest]
        assert each.refs.referrers(here, Digest.of(b"another")) == []
    shown = store.refs.referrers(there, digest)[0]
    assert shown.artifact_type == "application/vnd.example.sbom.v1"
    assert dict(shown.annotations) == {"org.example.kind": "test"}


def test_a_manifest_whose_subject_cannot_be_told_is_not_there(store: Store) -> None:
    """Else no caller would commit it again, and its subject would not list it."""
    here = Repository("quay.io", "a/b")
    subject = image().top
    signature = artifact(subject).top
    in_the_way = store.root / "referrers" / subject.digest
    in_the_way.touch()
    with pytest.raises(StoreError):
        store.commit_manifest(here, holder_of(signature))
    digest = Digest.parse(signature.digest)
    assert store.refs.find_manifest(here, digest) is None
    in_the_way.unlink()
    store.commit_manifest(here, holder_of(signature))
    found = store.refs.referrers(here, Digest.parse(subject.digest))
    assert [each.digest for each in found] == [digest]


def test_records_of_one_subject_are_bounded(store: Store) -> None:
    """Any repository's manifests may name any subject."""
    subject = Digest.of(b"subject")
    folder = store.root / "referrers" / str(subject)
    folder.mkdir(parents=True)
    for number in range(REFERRERS_OF_ONE):
        (folder / str(Digest.of(str(number).encode()))).write_bytes(b"{}")
    more = Descriptor(OCI_MANIFEST, Digest.of(b"one more"), 8)
    store.refs.put_referrer(subject, more)
    assert len(list(folder.iterdir())) == REFERRERS_OF_ONE
    known = Descriptor(OCI_MANIFEST, Digest.of(b"0"), 8)
    store.refs.put_referrer(subject, known)
    assert json.loads((folder / str(known.digest)).read_bytes()) == known.to_json()
