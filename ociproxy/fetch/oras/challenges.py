"""Challenges: what an upstream asks for in a Www-Authenticate header."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from typing import NamedTuple

from requests.utils import unquote_header_value


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a Www-Authenticate header; scheme and parameter names in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """RFC 9110, 11.6.1: commas separate challenges as well as their parameters. A part that has a
    word and a space before its first `=` begins a challenge."""
    challenges: list[Challenge] = []
    for part in filter(str.strip, urllib.request.parse_http_list(header)):
        name, equals, value = part.partition("=")
        scheme, space, name = name.strip().rpartition(" ")
        if space or not equals:
            challenges.append(Challenge((scheme or name).strip().lower(), {}))
        if equals and challenges:
            parameter = unquote_header_value(value.strip())
            challenges[-1].parameters.setdefault(name.strip().lower(), parameter)
    return challenges


def find_challenge(header: str) -> Challenge | None:
    """The first bearer challenge, else the first basic one: a token saves sending the password."""
    known = {challenge.scheme: challenge for challenge in reversed(parse_challenges(header))}
    return known.get("bearer") or known.get("basic")


class Demand(NamedTuple):
    """What a challenge asks for. The scope is empty where it names none."""

    scheme: str
    realm: str
    service: str
    scope: str

    @staticmethod
    def of(challenge: Challenge) -> Demand:
        given = challenge.parameters.get
        names = ("realm", "service", "scope")
        return Demand(challenge.scheme, *(given(name, "") for name in names))
