"""Tags in pages (distribution-spec, listing tags): what a client asks for, and the page where no
upstream makes one.

Tests: tests/serve/test_lists.py, tests/fetch/contract.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode

from ociproxy.fetch.backend import Listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.oci.reference import Repository


@dataclass(frozen=True, slots=True)
class TagsQuery:
    """`n` and `last` as the client sent them; n is None without a limit."""

    n: int | None = None
    last: str = ""
    is_whole: bool = True
    """False where the query has more: an upstream's own name of a page, which only it knows."""

    @staticmethod
    def parse(query: str) -> TagsQuery:
        """A limit that is no number is none."""
        asked = parse_qs(query, keep_blank_values=True)
        n = asked.get("n", [""])[0]
        return TagsQuery(
            int(n) if n.isascii() and n.isdigit() else None,
            asked.get("last", [""])[0],
            is_whole=asked.keys() <= {"n", "last"},
        )

    def encode(self) -> str:
        pairs = [("n", str(self.n))] if self.n is not None else []
        return urlencode(pairs + ([("last", self.last)] if self.last else []))


def page_of_tags(repository: Repository, tags: Sequence[str], query: TagsQuery) -> Listing:
    """At most `n` of these tags, which are in order, after `last`."""
    following = [tag for tag in tags if tag > query.last]
    page = following if query.n is None else following[: query.n]
    more = len(page) < len(following)
    next_query = TagsQuery(query.n, page[-1]).encode() if page and more else ""
    raw = json.dumps({"name": repository.name, "tags": page}).encode()
    return Listing(raw, "application/json", next_query=next_query)
