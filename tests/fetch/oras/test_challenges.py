"""Www-Authenticate headers, as found and as the RFC allows them."""

from __future__ import annotations

import pytest

from ociproxy.fetch.oras.challenges import Challenge, find_challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        (",", []),
        ("Negotiate", [("negotiate", {})]),
        ('Basic realm="a b"', [("basic", {"realm": "a b"})]),
        ("basic realm=plain", [("basic", {"realm": "plain"})]),
        ("Basic   realm=a", [("basic", {"realm": "a"})]),
        (
            'Bearer realm="https://r/token?a=b,c", service="s", scope="repository:a/b:pull,push"',
            [
                (
                    "bearer",
                    {
                        "realm": "https://r/token?a=b,c",
                        "service": "s",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (
            'Bearer realm="r",service="s",Basic realm="b", Negotiate, Digest qop=auth, nonce="=="',
            [
                ("bearer", {"realm": "r", "service": "s"}),
                ("basic", {"realm": "b"}),
                ("negotiate", {}),
                ("digest", {"qop": "auth", "nonce": "=="}),
            ],
        ),
        (r'Bearer realm="a\"b" , SERVICE = s', [("bearer", {"realm": 'a"b', "service": "s"})]),
        ('realm="without a scheme"', []),
    ],
)
def test_parse_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header) == [Challenge(*each) for each in expected]


def test_a_token_is_preferred_to_the_password() -> None:
    assert find_challenge("Negotiate") is None
    for header in ('Basic realm="b", Bearer realm="t"', 'Bearer realm="t", Basic realm="b"'):
        assert find_challenge(header) == Challenge("bearer", {"realm": "t"})
    assert find_challenge('Digest nonce="1", Basic realm="b"') == Challenge("basic", {"realm": "b"})
