"""The walk through an image's manifests: in order, each once, and not without end."""

from __future__ import annotations

import itertools

import pytest

from ociproxy.oci import image
from ociproxy.oci.descriptor import OCI_INDEX, OCI_MANIFEST, Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.image import MAX_DEPTH, ImageWalk


def described(name: str) -> Descriptor:
    return Descriptor(OCI_INDEX, Digest.of(name.encode()), 1, artifact_type=name)


def walk(tree: dict[str, str]) -> ImageWalk:
    """`tree` has the children of each name, a letter each."""
    walking = ImageWalk(described("a"))
    while walking.level:
        levels = [tree.get(each.artifact_type, "") for each in walking.level]
        walking.advance([[described(name) for name in below] for below in levels])
    return walking


def reached(walking: ImageWalk) -> str:
    return "".join(each.artifact_type for each in walking.reached.values())


def children_first(walking: ImageWalk) -> str:
    return "".join(each.artifact_type for each in walking.children_first())


@pytest.mark.parametrize(
    ("tree", "down", "up"),
    [
        ({}, "a", "a"),
        ({"a": "bc", "b": "de", "c": "f"}, "abcdef", "debfca"),
        ({"a": "bc", "b": "d", "c": "d"}, "abcd", "dbca"),
        ({"a": "bcb"}, "abc", "bca"),
        ({"a": "bc", "c": "db", "b": "d"}, "abcd", "dbca"),
    ],
    ids=["alone", "tree", "shared", "twice", "across levels"],
)
def test_parents_come_first_on_the_way_down_and_children_on_the_way_up(
    tree: dict[str, str], down: str, up: str
) -> None:
    walking = walk(tree)
    assert (reached(walking), children_first(walking)) == (down, up)
    assert walking.beyond == []


def test_a_digest_that_is_described_in_two_ways_is_walked_in_both() -> None:
    top = described("a")
    image_of_it = top._replace(media_type=OCI_MANIFEST)
    walking = ImageWalk(top)
    walking.advance([[top, image_of_it]])
    assert walking.level == [image_of_it]


def test_the_depth_has_a_limit() -> None:
    names = "abcdefghijkl"
    walking = walk(dict(itertools.pairwise(names)))
    assert [each.artifact_type for each in walking.beyond] == [names[MAX_DEPTH + 1]]
    assert reached(walking) == names[: MAX_DEPTH + 2]


def test_the_number_of_manifests_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_MANIFESTS", 3)
    walking = walk({"a": "bcd", "b": "ef"})
    assert [each.artifact_type for each in walking.beyond] == ["d", "e", "f"]


def test_a_long_way_down_that_the_depth_does_not_count_is_walked() -> None:
    """The top lists all, and each lists the next: every one is on the first level."""
    names = [chr(0x4E00 + number) for number in range(2000)]
    tree = dict(itertools.pairwise(names))
    walking = walk({**tree, "a": "".join(names)})
    assert walking.beyond == []
    assert children_first(walking) == "".join(reversed(names)) + "a"
