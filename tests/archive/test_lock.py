"""Locks: one canonical form, and a refusal that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ociproxy.archive.lock import LOCK_MAX_SIZE, Lock, LockedImage
from ociproxy.errors import LockInvalid
from ociproxy.oci.descriptor import OCI_INDEX, Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference


def digest(text: str) -> Digest:
    return Digest.of(text.encode())


def image(reference: str, **more: Any) -> LockedImage:
    made = Descriptor(OCI_INDEX, digest(reference), 7)
    return LockedImage(Reference.parse(reference), made, **more)


FULL = Lock(
    images=(
        image("quay.io/b/b:1", platforms=(Platform("linux", "arm", "v7"),)),
        image("quay.io/a/a:1", complete=False, missing=(digest("x"),)),
        image(f"quay.io/a/a@{digest('quay.io')}", flattened_from=digest("y")),
    ),
    contents={digest("2"): 2, digest("1"): 1},
    base=digest("base"),
    omitted=frozenset({digest("1")}),
)


def test_a_lock_survives_its_own_form() -> None:
    raw = FULL.encode()
    parsed = Lock.parse(raw, "x")
    assert parsed.encode() == raw
    assert {each.reference: each for each in parsed.images} == {
        each.reference: each for each in FULL.images
    }
    assert (parsed.contents, parsed.base, parsed.omitted) == (
        FULL.contents,
        FULL.base,
        FULL.omitted,
    )


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        (Platform("linux", "arm64", "v8.2+sve"), True),
        (Platform("windows", "amd64", "", "10.0.20348.2113"), True),
        (Platform("windows", "amd64", "", "10.0 beta"), False),
        (Platform("", ""), False),
        (Platform("", "amd64"), False),
        (Platform("linux", ""), False),
        (Platform("li nux", "amd/64"), False),
    ],
)
def test_a_lock_is_readable_whatever_platform_an_image_says_it_has(
    place: Platform, kept: bool
) -> None:
    made = Lock((image("nginx", platforms=(place, Platform("linux", "amd64"))),))
    [read] = Lock.parse(made.encode(), "x").images
    assert set(read.platforms) == {Platform("linux", "amd64"), *((place,) if kept else ())}


def test_a_platform_that_is_none_hides_no_image() -> None:
    document = json.loads(Lock((image("nginx"),)).encode())
    document["images"][0]["platforms"] = ["", "a/b/c/d", "linux/amd64"]
    [read] = Lock.parse(json.dumps(document).encode(), "x").images
    assert read.platforms == (Platform("linux", "amd64"),)


def test_the_form_is_the_documented_one() -> None:
    made = Lock((image("nginx", platforms=(Platform("linux", "amd64"),)),), {digest("1"): 1})
    assert json.loads(made.encode()) == {
        "format": "ociproxy-lock/1",
        "images": [
            {
                "reference": "docker.io/library/nginx:latest",
                "digest": str(digest("nginx")),
                "mediaType": OCI_INDEX,
                "size": 7,
                "platforms": ["linux/amd64"],
                "complete": True,
            }
        ],
        "contents": [{"digest": str(digest("1")), "size": 1}],
    }


def test_equal_locks_are_equal_bytes_whatever_the_order() -> None:
    turned = Lock(
        images=FULL.images[::-1],
        contents=dict(list(FULL.contents.items())[::-1]),
        base=FULL.base,
        omitted=FULL.omitted,
    )
    assert turned.encode() == FULL.encode()
    assert turned.digest == FULL.digest
    assert FULL.encode().endswith(b"}\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "ociproxy-lock/2"}, "format"),
        ({"images": {}}, "images is not a list"),
        ({"images": [1]}, "an image is not an object"),
        ({"images": [{"reference": 1}]}, "reference of an image is not text"),
        ({"images": [{"reference": "a b"}]}, "invalid name"),
        ({"images": [{"reference": "a"}]}, "lacks mediaType or digest"),
        ({"images": [{"reference": "a", "complete": 1}]}, "complete"),
        ({"contents": [{"digest": "sha256:1", "size": 1}]}, "invalid digest"),
        ({"contents": [{"digest": str(digest("1")), "size": -1}]}, "count of bytes"),
        ({"contents": [{"digest": str(digest("1")), "size": 1 << 63}]}, "count of bytes"),
        ({"contents": ["x"]}, "not an object"),
        ({"base": 1}, "base is not text"),
        ({"omitted": [1]}, "omitted is not text"),
    ],
)
def test_what_is_no_lock_is_refused_by_name(change: dict[str, object], reason: str) -> None:
    raw = json.dumps({**json.loads(FULL.encode()), **change}).encode()
    with pytest.raises(LockInvalid, match=reason) as refused:
        Lock.parse(raw, "site.lock")
    assert "site.lock" in str(refused.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"[" * 100_000, b"nginx\n"])
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(LockInvalid):
        Lock.parse(raw, "x")


def test_a_lock_beyond_all_measure_is_refused() -> None:
    with pytest.raises(LockInvalid, match="larger"):
        Lock.parse(b" " * (LOCK_MAX_SIZE + 1), "x")
