"""The files and names of an OCI image layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ociproxy.errors import LayoutInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import (
    LayoutDirectory,
    blob_path,
    check_marker,
    parse_blob_path,
    parse_index,
)
from tests import images, layouts

IMAGE = images.image()
DIGEST = Digest.parse(IMAGE.digest)


def entry(**annotations: str) -> bytes:
    described = IMAGE.top.descriptor(annotations=annotations)
    return json.dumps({"schemaVersion": 2, "manifests": [described]}).encode()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_path_leads_back_to_its_digest(algorithm: str) -> None:
    digest = Digest.of(b"x", algorithm)
    assert parse_blob_path(blob_path(digest)) == digest


@pytest.mark.parametrize(
    "path",
    [
        "blobs/sha256",
        "blobs/sha256/ff",
        f"blobs/md5/{'0' * 32}",
        f"blobs/sha256/{'F' * 64}",
        f"blobs/sha256/{'0' * 64}/x",
        f"./blobs/sha256/{'0' * 64}",
        "index.json",
    ],
)
def test_other_paths_have_no_digest(path: str) -> None:
    assert parse_blob_path(path) is None


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"imageLayoutVersion": "2.0.0"}'])
def test_a_marker_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(LayoutInvalid, match=r"^x\.tar: "):
        check_marker(raw, "x.tar")


@pytest.mark.parametrize(
    ("annotations", "reference", "tag"),
    [
        ({layouts.IMAGE_NAME: "docker.io/library/nginx:1"}, "docker.io/library/nginx:1", ""),
        ({layouts.REF_NAME: "quay.io/a/b:c"}, "quay.io/a/b:c", ""),
        ({layouts.REF_NAME: "nginx:1.25"}, "docker.io/library/nginx:1.25", ""),
        (
            {layouts.REF_NAME: "1", layouts.IMAGE_NAME: "index.docker.io/nginx:1"},
            "docker.io/library/nginx:1",
            "",
        ),
        (
            {layouts.REF_NAME: f"quay.io/a@{IMAGE.digest}"},
            f"quay.io/a@{IMAGE.digest}",
            "",
        ),
        ({layouts.REF_NAME: "latest"}, "None", "latest"),
        ({layouts.REF_NAME: "no\x1b[31mtag"}, "None", ""),
        ({}, "None", ""),
    ],
)
def test_names_come_from_the_annotations(
    annotations: dict[str, str], reference: str, tag: str
) -> None:
    (named,) = parse_index(entry(**annotations), "x.tar")
    assert (str(named.reference), named.tag, named.problem) == (reference, tag, "")


@pytest.mark.parametrize("name", ["quay.io/../x:1", "quay.io/a:!", f"quay.io/a@sha256:{'0' * 64}"])
def test_a_wrong_name_is_a_problem_of_its_image_only(name: str) -> None:
    (named,) = parse_index(entry(**{layouts.REF_NAME: name}), "x.tar")
    assert named.reference is None
    assert named.problem


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"manifests": 1}', b'{"manifests": [{}]}'])
def test_an_index_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(LayoutInvalid, match=r"index\.json"):
        parse_index(raw, "x.tar")


def test_a_folder_is_a_layout(tmp_path: Path) -> None:
    layout = LayoutDirectory(layouts.write_folder(tmp_path, layouts.members({"a.io/b:c": IMAGE})))
    layout.check()
    (named,) = layout.images()
    assert str(named.reference) == "a.io/b:c"
    file = layout.open_blob(DIGEST)
    assert file is not None
    with file:
        assert file.read() == IMAGE.top.data
    assert layout.open_blob(Digest.of(b"something else")) is None


def test_a_folder_without_a_marker_is_none(tmp_path: Path) -> None:
    with pytest.raises(LayoutInvalid, match="has no oci-layout"):
        LayoutDirectory(tmp_path).check()


def test_links_and_pipes_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    layout = LayoutDirectory(layouts.write_folder(tmp_path, layouts.members({"a.io/b:c": IMAGE})))
    path = tmp_path / blob_path(DIGEST)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LayoutInvalid, match=DIGEST.encoded):
        layout.open_blob(DIGEST)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LayoutInvalid, match="not a regular file"):
        layout.open_blob(DIGEST)
