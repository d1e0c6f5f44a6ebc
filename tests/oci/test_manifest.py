"""Manifests: looked into, guessed, and never taken for more than they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.errors import DigestMismatch, SizeMismatch
from ociproxy.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    OCI_INDEX,
    OCI_MANIFEST,
    UNKNOWN_MEDIA_TYPE,
    Descriptor,
    MalformedManifest,
)
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import (
    ImageManifest,
    Index,
    ManifestHolder,
    OtherManifest,
    guess_media_type,
    parse_manifest,
    referrer_descriptor,
)
from ociproxy.oci.platform import Platform
from tests.images import Content, artifact, image, multi_platform

DIGEST = "sha256:" + "a" * 64
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(DIGEST),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "manifests",
                    "config",
                    "layers",
                    "subject",
                    "mediaType",
                    "digest",
                    "size",
                    "platform",
                    "annotations",
                ]
            ),
            inner,
        )
    ),
    max_leaves=20,
)


def descriptor(**changes: object) -> dict[str, Any]:
    return {"mediaType": "text/x", "digest": DIGEST, "size": 1, **changes}


def holder_of(content: Content) -> ManifestHolder:
    return ManifestHolder.of(content.data, content.media_type)


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_lists_its_platforms_in_order(docker: bool) -> None:
    made = multi_platform(docker=docker)
    manifest = holder_of(made.top).manifest
    assert isinstance(manifest, Index)
    platforms = [str(each.platform) for each in manifest.manifests]
    assert platforms == ["linux/amd64", "linux/arm64", "linux/arm/v7"]
    assert [str(each.digest) for each in manifest.manifests] == [c.digest for c in made.manifests]
    assert all(each.is_image and not each.is_index for each in manifest.manifests)


@pytest.mark.parametrize("docker", [False, True])
def test_an_image_names_its_blobs_with_their_sizes(docker: bool) -> None:
    made = image(docker=docker, layers=2)
    manifest = holder_of(made.top).manifest
    assert isinstance(manifest, ImageManifest)
    found = [(str(each.digest), each.size) for each in manifest.blobs]
    assert found == [(blob.digest, blob.size) for blob in made.blobs]


def test_a_blob_counts_once_and_a_layer_with_urls_like_any_other() -> None:
    foreign = descriptor(digest="sha256:" + "f" * 64, urls=["http://elsewhere/layer"])
    document = {"config": descriptor(), "layers": [descriptor(), foreign]}
    manifest = parse_manifest(json.dumps(document).encode(), OCI_MANIFEST)
    assert isinstance(manifest, ImageManifest)
    assert [str(each.digest) for each in manifest.blobs] == [DIGEST, foreign["digest"]]


def test_null_layers_are_no_layers() -> None:
    raw = json.dumps({"config": descriptor(), "layers": None}).encode()
    manifest = parse_manifest(raw, OCI_MANIFEST)
    assert isinstance(manifest, ImageManifest)
    assert manifest.layers == ()


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        ({"mediaType": DOCKER_LIST, "manifests": []}, DOCKER_LIST),
        ({"mediaType": "application/vnd.example+json"}, "application/vnd.example+json"),
        ({"manifests": []}, OCI_INDEX),
        ({"config": {}, "layers": []}, OCI_MANIFEST),
        ({"layers": []}, OCI_MANIFEST),
        ({"mediaType": "", "layers": []}, OCI_MANIFEST),
        ({"mediaType": 7, "layers": []}, OCI_MANIFEST),
        ({"schemaVersion": 1}, DOCKER_SCHEMA1),
        ({"schemaVersion": 1, "signatures": []}, DOCKER_SCHEMA1_SIGNED),
        ({}, UNKNOWN_MEDIA_TYPE),
    ],
)
def test_a_missing_media_type_is_the_documents_or_its_shapes(
    document: dict[str, object], media_type: str
) -> None:
    assert guess_media_type(json.dumps(document).encode()) == media_type


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"[]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1']
)
def test_what_is_no_json_object_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(MalformedManifest):
        guess_media_type(raw)
    with pytest.raises(MalformedManifest):
        parse_manifest(raw, "application/vnd.example+json")


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "text",
        {},
        descriptor(digest="sha256:abc"),
        descriptor(digest="../../etc/passwd"),
        descriptor(digest=None),
        descriptor(mediaType=None),
        descriptor(size=-1),
        descriptor(size="1"),
        descriptor(size=1.5),
        descriptor(size=True),
        descriptor(size=1 << 63),
        descriptor(size=None),
    ],
)
def test_a_descriptor_that_describes_nothing_spoils_its_manifest(broken: object) -> None:
    for document, media_type in (
        ({"manifests": [broken]}, OCI_INDEX),
        ({"config": broken, "layers": []}, OCI_MANIFEST),
        ({"config": descriptor(), "layers": [broken]}, DOCKER_MANIFEST),
    ):
        with pytest.raises(MalformedManifest):
            parse_manifest(json.dumps(document).encode(), media_type)


def test_an_index_with_absurdly_many_entries_is_refused() -> None:
    raw = json.dumps({"manifests": [0] * 20_001}).encode()
    with pytest.raises(MalformedManifest, match="20001"):
        parse_manifest(raw, OCI_INDEX)


@given(st.dictionaries(st.sampled_from(["manifests", "config", "layers"]), JSON_VALUES))
def test_any_document_is_a_manifest_or_malformed(document: dict[str, object]) -> None:
    raw = json.dumps(document).encode()
    for media_type in (OCI_INDEX, OCI_MANIFEST, "text/x"):
        try:
            parse_manifest(raw, media_type)
        except MalformedManifest:
            assert media_type != "text/x"


@given(JSON_VALUES)
def test_a_descriptor_survives_its_own_json(value: object) -> None:
    try:
        parsed = Descriptor.from_json(value)
    except MalformedManifest:
        return
    assert Descriptor.from_json(parsed.to_json()) == parsed


def test_a_full_descriptor_survives_its_own_json() -> None:
    full = Descriptor(
        OCI_MANIFEST,
        Digest.parse(DIGEST),
        7,
        platform=Platform("linux", "arm", "v7"),
        urls=("https://example.com/layer",),
        artifact_type="text/x",
        annotations=(("k", "v"),),
    )
    assert Descriptor.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_bytes_become_a_manifest_only_if_they_are_the_descriptors() -> None:
    raw = image().top.data
    right = Descriptor(OCI_MANIFEST, Digest.of(raw), len(raw))
    assert ManifestHolder.verified(raw, right).raw is raw
    with pytest.raises(SizeMismatch):
        ManifestHolder.verified(raw + b" ", right)
    with pytest.raises(DigestMismatch):
        ManifestHolder.verified(raw[:-1] + b" ", right)


def test_a_sha512_descriptor_is_checked_with_sha512() -> None:
    raw = image().top.data
    right = Descriptor(OCI_MANIFEST, Digest.of(raw, "sha512"), len(raw))
    assert ManifestHolder.verified(raw, right) == ManifestHolder.of(
        raw, OCI_MANIFEST, algorithm="sha512"
    )


def test_a_referrer_shows_its_artifact_type_and_annotations() -> None:
    subject = image().top
    made = artifact(subject, artifact_type="application/vnd.example.sbom.v1")
    holder = holder_of(made.top)
    assert holder.manifest.subject is not None
    assert str(holder.manifest.subject.digest) == subject.digest
    shown = referrer_descriptor(holder)
    assert shown.to_json() == {
        "mediaType": OCI_MANIFEST,
        "digest": made.digest,
        "size": made.top.size,
        "artifactType": "application/vnd.example.sbom.v1",
        "annotations": {"org.example.kind": "test"},
    }


def test_a_referrer_without_artifact_type_is_what_its_config_is() -> None:
    document = {
        "config": descriptor(mediaType="application/vnd.example.config"),
        "layers": [],
        "subject": descriptor(),
    }
    holder = ManifestHolder.of(json.dumps(document).encode(), OCI_MANIFEST)
    assert referrer_descriptor(holder).artifact_type == "application/vnd.example.config"


def test_any_other_document_may_have_a_subject() -> None:
    raw = json.dumps({"subject": descriptor(), "config": "whatever"}).encode()
    manifest = parse_manifest(raw, "application/vnd.example+json")
    assert isinstance(manifest, OtherManifest)
    assert manifest.subject is not None


@pytest.mark.parametrize("called", ["application/json", "Text/Plain; charset=utf-8", ""])
def test_what_is_called_nothing_in_particular_is_what_it_looks_like(called: str) -> None:
    raw = json.dumps({"config": descriptor(), "layers": [descriptor()]}).encode()
    assert isinstance(parse_manifest(raw, called), ImageManifest)
    raw = json.dumps({"mediaType": called, "manifests": [descriptor()]}).encode()
    assert isinstance(parse_manifest(raw, called), Index)
    assert isinstance(parse_manifest(b'{"mediaType": "application/x"}', called), OtherManifest)


@pytest.mark.parametrize(
    "own", [None, "application/vnd.example+json", "application/vnd.example+json; version=1", "it"]
)
def test_an_unknown_type_may_use_the_fields_of_an_image(own: str | None) -> None:
    """As it likes."""
    for fields in ({"config": {"name": "x"}}, {"manifests": [descriptor()]}):
        raw = json.dumps(fields | ({"mediaType": own} if own else {})).encode()
        assert isinstance(parse_manifest(raw, "application/vnd.example+json"), OtherManifest)


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({"mediaType": OCI_MANIFEST, "config": {}}, "application/vnd.example+json"),
        ({"mediaType": DOCKER_LIST, "manifests": []}, "application/vnd.example+json"),
        ({"config": {}, "layers": []}, OCI_INDEX),
        ({"manifests": []}, DOCKER_MANIFEST),
    ],
)
def test_an_image_or_index_is_nothing_else(fields: dict[str, Any], called: str) -> None:
    """As that it would be whole without what it consists of."""
    with pytest.raises(MalformedManifest, match="described as"):
        parse_manifest(json.dumps(fields).encode(), called)


@pytest.mark.parametrize(
    "spelled",
    [
        f"{OCI_MANIFEST}; charset=utf-8",
        OCI_MANIFEST.replace("oci.image", "OCI.Image"),
        f" {OCI_MANIFEST} ",
    ],
)
def test_a_manifests_media_type_may_be_spelled_otherwise(spelled: str) -> None:
    assert Descriptor.from_json(descriptor(mediaType=spelled)).media_type == OCI_MANIFEST
    raw = json.dumps({"mediaType": spelled, "config": descriptor(), "layers": []}).encode()
    assert guess_media_type(raw) == OCI_MANIFEST


def test_any_other_media_type_stays_as_it_is_written() -> None:
    """Clients compare it letter by letter, as an artifact type."""
    for written in ("application/vnd.Example+json; version=1", "text/plain; charset=utf-8"):
        assert Descriptor.from_json(descriptor(mediaType=written)).media_type == written
