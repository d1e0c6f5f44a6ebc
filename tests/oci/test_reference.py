"""References: Docker's normalisation, and text that is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import (
    Reference,
    Repository,
    check_tag,
    parse_registry,
    referrers_tag,
    signature_tags,
    subject_prefix,
)

DIGEST = "sha256:" + "a" * 64

NEARLY_REFERENCES = st.builds(
    "".join,
    st.lists(
        st.sampled_from(
            [
                *[
                    "a",
                    "B",
                    "0",
                    "library",
                    "quay.io",
                    "localhost",
                    "[::1]",
                    ":",
                    "5000",
                    "/",
                    "..",
                    ".",
                    "_",
                    "__",
                    "-",
                    "@",
                    "sha256:",
                    "%2f",
                    "é",
                ],
                "\n",
                " ",
                DIGEST,
            ]
        ),
        max_size=12,
    ),
)


@pytest.mark.parametrize(
    ("text", "registry", "name", "tag"),
    [
        ("nginx", "docker.io", "library/nginx", "latest"),
        ("nginx:1.27", "docker.io", "library/nginx", "1.27"),
        ("a/b", "docker.io", "a/b", "latest"),
        ("docker.io/nginx", "docker.io", "library/nginx", "latest"),
        ("index.docker.io/nginx", "docker.io", "library/nginx", "latest"),
        ("registry-1.docker.io/nginx", "docker.io", "library/nginx", "latest"),
        ("quay.io/a", "quay.io", "a", "latest"),
        ("QUAY.io/a/b:T", "quay.io", "a/b", "T"),
        ("localhost/a", "localhost", "a", "latest"),
        ("localhost:5000/a:b", "localhost:5000", "a", "b"),
        ("host:5000/a", "host:5000", "a", "latest"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000", "a/b", "latest"),
        ("[::1]:5000/a", "[::1]:5000", "a", "latest"),
        ("[fd00::A]/a", "[fd00::a]", "a", "latest"),
        ("registry.k8s.io/sig-storage/a__b/c.d", "registry.k8s.io", "sig-storage/a__b/c.d", None),
        ("ghcr.io/a/b/c/d/e/f", "ghcr.io", "a/b/c/d/e/f", "latest"),
        ("quay.io/Mixed/Case", "quay.io", "Mixed/Case", "latest"),
    ],
)
def test_a_reference_is_normalised_as_docker_does(
    text: str, registry: str, name: str, tag: str | None
) -> None:
    reference = Reference.parse(text)
    assert reference.repository == Repository(registry, name)
    assert reference.tag == (tag or "latest")
    assert reference.digest is None


def test_a_reference_by_digest_has_no_tag() -> None:
    reference = Reference.parse(f"nginx@{DIGEST}")
    assert reference.tag is None
    assert reference.digest == Digest.parse(DIGEST)
    assert str(reference) == f"docker.io/library/nginx@{DIGEST}"


def test_a_tag_may_come_with_the_digest_it_must_have() -> None:
    reference = Reference.parse(f"localhost:5000/a:b@{DIGEST}")
    assert (reference.tag, reference.digest) == ("b", Digest.parse(DIGEST))
    assert str(reference) == f"localhost:5000/a:b@{DIGEST}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "quay.io/",
        "quay.io/../a",
        "quay.io/a/./b",
        "quay.io/a/..",
        "quay.io/_tags",
        "quay.io/a/_manifests/b",
        "quay.io/-a",
        "quay.io/a.",
        "quay.io/a..b",
        "quay.io/a___b",
        "quay.io/a b",
        "quay.io/a\n",
        "quay.io/é",
        "quay.io/a%2fb",
        "a:",
        "a:b:c",
        "a:.b",
        "a:-b",
        "a:" + "t" * 129,
        "a:b\n",
        "host:0/a",
        "host:65536/a",
        "host:999999/a",
        "ho_st-.io/a",
        "quay.io/" + "a" * 256,
        ("x" * 60 + ".") * 5 + "io/a",
    ],
)
def test_what_is_no_reference_is_refused_in_one_line(text: str) -> None:
    with pytest.raises((NameInvalid, DigestInvalid)) as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a@", "a@sha256:abc", f"a@{DIGEST}@{DIGEST}", "a@b"])
def test_what_follows_the_at_sign_must_be_a_digest(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Reference.parse(text)


@given(st.text() | NEARLY_REFERENCES)
def test_any_text_is_a_reference_or_invalid(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except (NameInvalid, DigestInvalid):
        return
    # A normalised reference is its own normal form, and safe to make a path of.
    assert Reference.parse(str(reference)) == reference
    assert ".." not in str(reference.repository).split("/")
    assert not str(reference).startswith("/")


@given(st.text() | NEARLY_REFERENCES)
def test_any_text_is_a_registry_or_invalid(text: str) -> None:
    try:
        registry = parse_registry(text)
    except NameInvalid:
        return
    assert parse_registry(registry) == registry
    assert "/" not in registry
    assert registry not in {"", ".", ".."}


@given(st.text() | NEARLY_REFERENCES)
def test_any_text_is_a_repository_name_or_invalid(text: str) -> None:
    try:
        repository = Repository.parse("quay.io", text)
    except NameInvalid:
        return
    assert repository.name == text
    assert not any(part.startswith(("_", ".")) for part in text.split("/"))


def test_the_end_of_a_manifests_path_is_a_tag_or_a_digest() -> None:
    repository = Repository.parse("quay.io", "a/b")
    assert Reference.of(repository, "V1.2_x") == Reference(repository, tag="V1.2_x")
    assert Reference.of(repository, DIGEST) == Reference(repository, digest=Digest.parse(DIGEST))
    with pytest.raises(DigestInvalid):
        Reference.of(repository, "sha256:short")
    with pytest.raises(NameInvalid):
        Reference.of(repository, "..")


@pytest.mark.parametrize("tag", ["a", "_", "A-b.C_d", "1", "t" * 128])
def test_a_tag_keeps_its_case_and_its_dots(tag: str) -> None:
    check_tag(tag)
    assert Reference.parse(f"quay.io/a:{tag}").tag == tag


def test_the_tag_of_referrers_has_64_digits_of_the_subject() -> None:
    assert referrers_tag(Digest.of(b"", "sha256")) == f"sha256-{Digest.of(b'').encoded}"
    longer = Digest.of(b"", "sha512")
    assert referrers_tag(longer) == f"sha512-{longer.encoded[:64]}"


def test_only_docker_hub_has_a_library() -> None:
    assert Repository.parse("docker.io", "nginx").name == "library/nginx"
    assert Repository.parse("index.docker.io", "nginx").registry == "docker.io"
    assert Repository.parse("quay.io", "nginx").name == "nginx"


def test_a_name_that_the_library_makes_too_long_is_refused() -> None:
    assert Repository.parse("docker.io", "a" * 247).name == "library/" + "a" * 247
    with pytest.raises(NameInvalid):
        Repository.parse("docker.io", "a" * 248)


def test_a_registry_without_a_dot_is_not_taken_for_a_repository_of_docker_hub() -> None:
    repository = Repository.parse("harbor", "team/app")
    assert repository.registry == "harbor"
    assert str(repository) == "harbor:443/team/app"
    assert Reference.parse(f"{repository}:v1").repository == repository
    assert Repository.parse("harbor:443", "team/app") == repository
    assert Repository.parse("harbor:5000", "team/app").registry == "harbor:5000"
    for registry in ("localhost", "quay.io", "quay.io:443"):
        assert str(Repository.parse(registry, "a/b")) == f"{registry}/a/b"


def test_the_tag_of_a_referrer_tells_of_what_it_is() -> None:
    for algorithm in ("sha256", "sha512"):
        subject = Digest.of(b"", algorithm)
        for tag in (referrers_tag(subject), *signature_tags(subject)):
            assert subject_prefix(tag) == (algorithm, subject.encoded[:64])
    assert [subject_prefix(tag) for tag in ("", "latest", "sha256-beef")] == [None] * 3
