"""Names, tags and digests that are meant to become another path in the store or at the upstream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.attack.conftest import assert_quiet, refusal
from tests.images import image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

MakeMirror = Callable[..., Mirror]

SEGMENTS = [
    "..",
    ".",
    "%2e%2e",
    "%2E%2e",
    ".%2e",
    "%252e%252e",
    "..%2f..",
    "..%5c..",
    "..\\..",
    "a%2f..%2fb",
    "%00",
    "a%00b",
    "%c0%ae%c0%ae",
    "%c0%af",
    "%e0%80%af",
    "%ef%bc%8e%ef%bc%8e",
    "%e2%80%a5",
    "%ff%fe",
    "_tags",
    "_manifests",
    "-a",
    "a-",
    "~root",
    "$HOME",
    "a%20b",
    "a%0ab",
    "a;b",
    "*",
    "%u002e%u002e",
]


def files(folder: Path) -> list[str]:
    """Everything in the store but the locks, which come by and by."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.parts[0] != "locks")


def test_no_spelling_of_a_path_leaves_its_place(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    held = upstream.add("app", image("app"), tag="v1")
    name = upstream.registry
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "serve": {"default_upstream": ""},
            "fetch": {"unlisted": "deny"},
        }
    )
    outside = server.store.parent / "secret"
    outside.write_text("secret", encoding="utf-8")
    before = files(server.store)
    digest = held.digest
    for segment in SEGMENTS:
        for target in (
            f"/v2/app/{segment}/manifests/v1?ns={name}",
            f"/v2/{segment}/app/manifests/v1?ns={name}",
            f"/v2/{segment}/manifests/v1?ns={name}",
            f"/v2/app/manifests/{segment}?ns={name}",
            f"/v2/app/manifests/v1?ns={segment}",
            f"/v2/app/manifests/v1?ns={segment}{name}",
            f"/v2/app/blobs/{segment}?ns={name}",
            f"/v2/app/blobs/sha256:{segment}?ns={name}",
            f"/v2/app/blobs/{segment}/{digest}?ns={name}",
            f"/v2/app/referrers/{segment}?ns={name}",
            f"/v2/app/tags/list/{segment}?ns={name}",
            f"/v2/{name}/{segment}/manifests/v1",
            f"/{segment}/{segment}/secret",
            f"/v2/{segment}",
        ):
            answer = server.get(target)
            assert answer.status in (400, 403, 404), (target, answer.status)
            assert b"secret" not in answer.body
    assert files(server.store) == before
    for seen in upstream.requests:
        # What reached the upstream is a tag or name that is a good one, spelled oddly.
        assert ".." not in seen.path
        assert "%" not in seen.path
    assert_quiet(server)


def test_a_link_in_the_store_s_place_is_no_way_out(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    """Tags are records: one that an attacker points elsewhere is an unreadable record."""
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    tags = server.store / "refs" / upstream.registry / "app" / "_tags"
    tags.mkdir(parents=True)
    (tags / "v1").symlink_to("/etc/passwd")
    answer = server.manifest(upstream.registry, "app", "v1")
    assert refusal(answer) == (404, "MANIFEST_UNKNOWN")
    assert b"root:" not in answer.body
    assert_quiet(server)
