"""Image lists: what a line may be, and what is said of one that may not."""

from __future__ import annotations

import pytest

from ociproxy.errors import ConfigError
from ociproxy.load.imagelist import ALL_PLATFORMS, Wanted, merged, parse_list, pinned
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
DIGEST = "sha256:" + "a" * 64


def parsed(text: str) -> list[Wanted]:
    wanted, problems = parse_list(text, "list", platforms=(AMD64,))
    assert problems == []
    return wanted


def problems(text: str) -> list[str]:
    return [str(problem) for problem in parse_list(text, "list")[1]]


@pytest.mark.parametrize(
    ("line", "reference"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("  team/app:v1\t", "docker.io/team/app:v1"),
        ("quay.io/a/b:c # because", "quay.io/a/b:c"),
        (f"quay.io/a/b:c@{DIGEST}", f"quay.io/a/b:c@{DIGEST}"),
        (f"b@{DIGEST}", f"docker.io/library/b@{DIGEST}"),
    ],
)
def test_line_is_a_reference(line: str, reference: str) -> None:
    (wanted,) = parsed(line)
    assert str(wanted.reference) == reference
    assert (wanted.platforms, wanted.strict, wanted.place) == ((AMD64,), False, "list:1")


@pytest.mark.parametrize("text", ["", "\n\n", "# only\n   # comments\n", "\t \r\n"])
def test_nothing_is_wanted_by_blanks_and_comments(text: str) -> None:
    assert parsed(text) == []


def test_lines_end_as_they_like_and_are_counted() -> None:
    assert [wanted.place for wanted in parsed("a\r\n\n# x\r\nb\nc")] == [
        "list:1",
        "list:4",
        "list:5",
    ]


def test_platforms_of_a_line_are_a_demand() -> None:
    one, every = parsed("a platform=linux/arm64,linux/aarch64\nb platform=all")
    assert (one.platforms, one.strict) == ((ARM64,), True)
    assert (every.platforms, every.strict) == (ALL_PLATFORMS, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a b", "after the reference may stand platform=..., not 'b'"),
        ("a platform=linux", "a platform is os/architecture[/variant]"),
        ("a platform=", "a platform is os/architecture[/variant]"),
        ("a platform=linux/amd64 platform=all", "stands there twice"),
        ("docker://nginx", "write it without docker://"),
        ("https://quay.io/a/b", "write it without https://"),
        ("a:tag:tag", "invalid name"),
        ("a@sha256:abc", "invalid digest"),
        ("a#b", "invalid name"),
        (DIGEST, "the id of an image on one node"),
        ("a" * 64, "the id of an image on one node"),
        ("- nginx", "after the reference may stand"),
    ],
)
def test_bad_line_is_reported_with_its_place(line: str, reason: str) -> None:
    (problem,) = problems(f"nginx\n{line}\nnginx")
    assert problem.startswith("list:2: ")
    assert reason in problem


def test_all_bad_lines_are_reported() -> None:
    assert len(problems("a b\nok\nc d\n")) == 2


def test_line_printed_is_the_line_read() -> None:
    for wanted in parsed("nginx\nquay.io/a:b platform=linux/arm64,windows/amd64\nc platform=all"):
        (again,), _ = parse_list(str(wanted), "again")
        assert (again.reference, again.platforms) == (wanted.reference, wanted.platforms)


def test_reference_twice_is_one_image_for_the_platforms_of_both() -> None:
    both = merged(parsed("a platform=linux/arm64\nb\na\nlibrary/a:latest platform=linux/amd64"))
    assert [str(wanted.reference.repository.name) for wanted in both] == ["library/a", "library/b"]
    assert both[0].platforms == (ARM64, AMD64)
    assert both[0].strict
    (every,) = merged(parsed("a platform=linux/arm64\na platform=all"))
    assert every.platforms == ALL_PLATFORMS


def test_lock_pins_what_it_has_and_the_rest_is_a_problem() -> None:
    pair = Reference.parse(f"quay.io/a:v1@{DIGEST}")
    locked = {Reference.parse("quay.io/a:v1"): pair}
    other = "sha256:" + "b" * 64
    wanted = parsed(f"quay.io/a:v1\nquay.io/b:v1\nquay.io/a:v1@{other}\nquay.io/c@{other}")
    found, wrong = pinned(wanted, locked)
    assert [(each.reference, each.pinned) for each in found] == [
        (pair, True),
        (Reference.parse(f"quay.io/c@{other}"), True),
    ]
    assert all(isinstance(problem, ConfigError) for problem in wrong)
    assert [str(problem) for problem in wrong] == [
        "list:2: quay.io/b:v1 is not in the lock",
        f"list:3: quay.io/a:v1@{other}: the lock has {DIGEST}",
    ]
