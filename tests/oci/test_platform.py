"""Platforms in one spelling, and the children of an index that are meant by them."""

from __future__ import annotations

import json

import pytest

from ociproxy.errors import NameInvalid
from ociproxy.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from ociproxy.oci.image import choose
from ociproxy.oci.manifest import Index, parse_manifest
from ociproxy.oci.platform import Platform
from tests.images import content

ATTESTED = "vnd.docker.reference.digest"


def index(*children: dict[str, object]) -> Index:
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(children)}
    parsed = parse_manifest(json.dumps(document).encode(), OCI_INDEX)
    assert isinstance(parsed, Index)
    return parsed


def child(name: str, platform: str = "", **more: object) -> dict[str, object]:
    made: dict[str, object] = {**content(name.encode(), OCI_MANIFEST).descriptor(), **more}
    if platform:
        keys = ("os", "architecture", "variant")
        made["platform"] = dict(zip(keys, platform.split("/"), strict=False))
    return made


def attestation(name: str, subject: dict[str, object]) -> dict[str, object]:
    return child(name, "unknown/unknown", annotations={ATTESTED: subject["digest"]})


def chosen(made: Index, *platforms: str, attestations: bool = False) -> list[int]:
    """The positions of the chosen children."""
    wanted = tuple(Platform.parse(text) for text in platforms)
    found = choose(made, wanted, attestations=attestations)
    return [made.manifests.index(each) for each in found]


@pytest.mark.parametrize(
    "text",
    ["linux/amd64", "linux/arm/v7", "windows/amd64", "linux/s390x", "windows/amd64:10.0.20348"],
)
def test_a_platform_in_normal_form_prints_as_it_was_written(text: str) -> None:
    assert str(Platform.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("windows(10.0.20348)/amd64", "windows/amd64:10.0.20348"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm64/v9", "linux/arm64/v9"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("Linux/X86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/i386", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        (" linux/amd64 ", "linux/amd64"),
    ],
)
def test_every_spelling_of_a_platform_is_one_platform(text: str, normal: str) -> None:
    assert str(Platform.parse(text)) == normal


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "a/b/", "linux/*", "a/b,c/d", "linux/a b"]
)
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(NameInvalid):
        Platform.parse(text)


def test_children_are_chosen_in_the_order_of_the_index() -> None:
    made = index(child("a", "linux/amd64"), child("b", "linux/arm64/v8"), child("c", "linux/386"))
    assert chosen(made, "linux/386", "linux/amd64") == [0, 2]
    assert chosen(made, "linux/arm64") == [1]
    assert chosen(made, "linux/s390x") == []


def test_no_platforms_choose_all_of_it() -> None:
    amd64 = child("a", "linux/amd64")
    made = index(amd64, attestation("att", amd64))
    assert chosen(made) == [0, 1]


def test_a_lower_variant_stands_in_for_one_that_is_not_offered() -> None:
    made = index(child("5", "linux/arm/v5"), child("6", "linux/arm/v6"), child("8", "linux/arm/v8"))
    assert chosen(made, "linux/arm/v7") == [1]
    assert chosen(made, "linux/arm/v5") == [0]
    plain = index(child("a", "linux/amd64"), child("b", "linux/arm64"))
    assert chosen(plain, "linux/amd64/v3") == [0]
    assert chosen(plain, "linux/arm64/v9") == []


def test_an_exact_variant_wins_and_a_higher_one_never_stands_in() -> None:
    made = index(child("a", "linux/amd64"), child("b", "linux/amd64/v3"))
    assert chosen(made, "linux/amd64/v3") == [1]
    assert chosen(made, "linux/amd64/v2") == [0]
    assert chosen(made, "linux/amd64") == [0]


def test_every_child_of_a_platform_is_chosen() -> None:
    # Windows indexes have one for each os.version.
    made = index(child("a", "windows/amd64"), child("b", "windows/amd64"))
    assert chosen(made, "windows/amd64") == [0, 1]


def test_a_child_without_a_platform_fits_every_one() -> None:
    made = index(child("a", "linux/amd64"), child("nested"))
    assert chosen(made, "linux/arm64") == [1]


def test_attestations_come_with_their_image_where_asked_for() -> None:
    amd64, arm64 = child("a", "linux/amd64"), child("b", "linux/arm64")
    made = index(amd64, arm64, attestation("x", amd64), attestation("y", arm64))
    assert chosen(made, "linux/amd64") == [0]
    assert chosen(made, "linux/amd64", attestations=True) == [0, 2]


def windows(version: str) -> dict[str, object]:
    place = {"os": "windows", "architecture": "amd64", "os.version": version}
    return child(version) | {"platform": place}


WINDOWS = index(
    *map(windows, ("10.0.17763.5820", "10.0.20348.2461", "10.0.203480.1")),
    child("linux", "linux/amd64"),
)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["windows/amd64:10.0.20348"], [1]),
        (["windows(10.0.20348.2461)/amd64"], [1]),
        (["windows/amd64:10.0.20348.9999"], []),
        (["windows/amd64"], [0, 1, 2]),
        (["windows/amd64:10.0.17763", "linux/amd64"], [0, 3]),
    ],
)
def test_windows_images_are_told_apart_by_their_version(
    wanted: list[str], expected: list[int]
) -> None:
    assert chosen(WINDOWS, *wanted) == expected
