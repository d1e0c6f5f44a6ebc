"""Digests: what is accepted as a name of content, and what is not."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.errors import DigestInvalid
from ociproxy.oci.digest import Digest

EMPTY_SHA256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

NEARLY_DIGESTS = st.builds(
    "".join,
    st.lists(
        st.sampled_from(["sha256", "sha512", "md5", ":", "a", "F", "0" * 63, "f" * 64, "\n", "é"]),
        max_size=6,
    ),
)


def test_a_parsed_digest_prints_as_it_was_written() -> None:
    digest = Digest.parse(EMPTY_SHA256)
    assert (digest.algorithm, digest.encoded) == tuple(EMPTY_SHA256.split(":"))
    assert str(digest) == EMPTY_SHA256


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_digest_of_bytes_is_that_of_hashlib(algorithm: str) -> None:
    expected = f"{algorithm}:{hashlib.new(algorithm, b'content').hexdigest()}"
    assert str(Digest.of(b"content", algorithm)) == expected
    assert str(Digest.of(memoryview(b"content"), algorithm)) == expected
    assert Digest.parse(expected) == Digest.of(b"content", algorithm)


def test_a_hasher_fed_in_pieces_ends_in_the_digest_of_the_whole() -> None:
    digest = Digest.of(b"one two", "sha512")
    hasher = digest.hasher()
    hasher.update(b"one ")
    hasher.update(b"two")
    assert Digest.finish(hasher, digest.algorithm) == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "a" * 64 + "\n",
        "sha256:" + "a" * 61 + "/..",
        "SHA256:" + "a" * 64,
        " sha256:" + "a" * 64,
        "sha512:" + "a" * 64,
        "md5:" + "a" * 32,
        "sha384:" + "a" * 96,
        "sha256:sha256:" + "a" * 64,
        # Digits, but not of ASCII.
        "sha256:" + "\N{ARABIC-INDIC DIGIT ONE}" * 64,
    ],
)
def test_what_cannot_be_verified_is_no_digest(text: str) -> None:
    with pytest.raises(DigestInvalid) as caught:
        Digest.parse(text)
    assert caught.value.text == text
    assert "\n" not in str(caught.value)


@given(st.text() | NEARLY_DIGESTS)
def test_any_text_is_a_digest_or_invalid(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except DigestInvalid:
        return
    assert str(digest) == text
