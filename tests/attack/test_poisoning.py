"""One registry, which every client may name, works against the clients of another one.

Blobs are named by their digest, so what one upstream says of a digest could become what clients of
all others get. Only verified bytes may cross.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from tests.attack.conftest import PUBLIC, Network, attempt, wait_until
from tests.images import Content, content, image, random_blob
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MakeUpstream = Callable[..., FakeUpstream]
Draw = Callable[..., Network]
BLOB = 3_000_000


def evil_and_good(
    mirror: MakeMirror, make_upstream: MakeUpstream, draw: Draw
) -> tuple[Mirror, FakeUpstream, str, FakeUpstream, Content]:
    """A mirror in the open world; an unlisted upstream and its name; a listed one; a blob that
    both say they have."""
    evil, good = make_upstream(), make_upstream()
    blob = random_blob(BLOB)
    for each in (evil, good):
        each.add_content("app", blob)
    network = draw({"evil.example": [[PUBLIC]]})
    server = mirror(
        {"fetch": {"unlisted": {"scheme": "auto"}}, "upstreams": [upstream_entry(good.url)]},
        env=network.environment,
    )
    return server, evil, f"evil.example:{evil.registry.partition(':')[2]}", good, blob


def test_a_stalled_download_of_another_registry_keeps_nobody_waiting(
    mirror: MakeMirror, make_upstream: MakeUpstream, draw: Draw
) -> None:
    server, evil, name, good, blob = evil_and_good(mirror, make_upstream, draw)
    evil.fault("/blobs/", Fault(stall_after=1000))
    attacker = threading.Thread(target=lambda: attempt(server, name, blob.digest))
    attacker.start()
    try:
        wait_until(lambda: evil.bytes_sent("/blobs/") == 1000)
        honest = server.request("GET", f"/v2/app/blobs/{blob.digest}?ns={good.registry}", timeout=5)
        assert (honest.status, honest.body) == (200, blob.data)
    finally:
        evil.heal()
        attacker.join(30)


def test_wrong_bytes_of_another_registry_reach_nobody_else(
    mirror: MakeMirror, make_upstream: MakeUpstream, draw: Draw
) -> None:
    server, evil, name, good, blob = evil_and_good(mirror, make_upstream, draw)
    evil.fault("/blobs/", Fault(flip_at=0, rate=BLOB // 2))
    good.fault("/blobs/", Fault(rate=BLOB * 2))
    attacker = threading.Thread(target=lambda: attempt(server, name, blob.digest))
    attacker.start()
    try:
        wait_until(lambda: evil.bytes_sent("/blobs/") > 0)
        assert server.blob(good.registry, "app", blob.digest).body == blob.data
    finally:
        attacker.join(30)


def test_a_manifest_cannot_lie_about_the_size_of_a_blob_elsewhere(
    mirror: MakeMirror, make_upstream: MakeUpstream, draw: Draw
) -> None:
    server, evil, name, good, blob = evil_and_good(mirror, make_upstream, draw)
    evil.remove("app", blob.digest)
    honest = image("honest")
    document = honest.top.json()
    document["layers"] = [{**blob.descriptor(), "size": 7}]
    lie = content(json.dumps(document).encode(), honest.top.media_type)
    evil.add_content("app", lie)
    assert server.manifest(name, "app", lie.digest).status == 200
    wait_until(lambda: evil.count(f"/blobs/{blob.digest}") > 0)
    answer = server.blob(good.registry, "app", blob.digest)
    assert (answer.status, answer.body) == (200, blob.data)
