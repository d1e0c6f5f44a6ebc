"""Registries whose ways with tokens and redirects are odd: what a node can pull, all can."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.images import image
from tests.load.loading import Load
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MakeUpstream = Callable[..., FakeUpstream]
ALICE = BasicAuth("alice", "wonder:land")


@pytest.fixture(params=["oras", "skopeo"])
def entry(request: pytest.FixtureRequest) -> Callable[[FakeUpstream], dict[str, object]]:
    """The entry of an upstream whose password is configured, for either backend."""

    def make(upstream: FakeUpstream) -> dict[str, object]:
        auth = {"user": ALICE.user, "password": ALICE.password}
        return upstream_entry(upstream.url, auth=auth, backend=request.param)

    return make


@pytest.mark.parametrize("status", [403, 404])
def test_a_registry_that_challenges_at_v2_alone_gets_the_password(
    mirror: MakeMirror,
    make_upstream: MakeUpstream,
    tmp_path: Path,
    entry: Callable[[FakeUpstream], dict[str, object]],
    status: int,
) -> None:
    upstream = make_upstream(auth=TokenAuth(credentials=ALICE, silent=status))
    app = upstream.add("team/app", image("app"), tag="v1")
    server = mirror({"upstreams": [entry(upstream)]})
    assert server.manifest(upstream.registry, "team/app", "v1").body == app.top.data
    for blob in app.blobs:
        assert server.blob(upstream.registry, "team/app", blob.digest).body == blob.data
    load = Load(tmp_path / "load")
    load.config.write_text(yaml.safe_dump({"upstreams": [entry(upstream)]}))
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 0, done.stderr
    assert load.has(app)


def test_blobs_that_another_registry_hands_out_for_an_anonymous_token_are_pulled(
    mirror: MakeMirror, make_upstream: MakeUpstream, tmp_path: Path
) -> None:
    upstream = make_upstream(auth=TokenAuth(credentials=ALICE))
    other = make_upstream(host="127.0.0.2", auth=TokenAuth())
    app = upstream.add("team/app", image("app", layers=3), tag="v1")
    other.add("team/app", app)
    upstream.fault("/blobs/", Fault(redirect=other.url))
    entry = upstream_entry(upstream.url, auth={"user": ALICE.user, "password": ALICE.password})
    server = mirror({"upstreams": [entry]})
    assert server.manifest(upstream.registry, "team/app", "v1").status == 200
    for blob in app.blobs:
        assert server.blob(upstream.registry, "team/app", blob.digest).body == blob.data
    load = Load(tmp_path / "load")
    load.config.write_text(yaml.safe_dump({"upstreams": [entry]}))
    assert load.run(load.write(f"{upstream.registry}/team/app:v1")).code == 0
    given = {request.headers.get("Authorization", "") for request in other.requests}
    assert not any(each.startswith("Basic") for each in given)
    issued = {f"Bearer {token}" for _, token in other._auth.issued}  # type: ignore[union-attr]
    assert given - {""} <= issued


def test_128_requests_at_once_for_manifests_and_lists_are_all_answered(
    mirror: MakeMirror, make_upstream: MakeUpstream
) -> None:
    """The upstream asks other scopes for its lists, and takes a while to give out a token."""
    upstream = make_upstream(auth=TokenAuth(list_action="metadata_read"))
    for number in range(64):
        upstream.add("team/app", image(str(number)), tag=f"v{number}")
    upstream.fault("/token", Fault(delay=0.2))
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"background_fills": 0}})

    def ask(number: int) -> int:
        if number % 2:
            path = f"/v2/team/app/tags/list?ns={upstream.registry}&last=v{number}"
            return server.get(path).status
        return server.manifest(upstream.registry, "team/app", f"v{number // 2}").status

    with ThreadPoolExecutor(128) as pool:
        assert set(pool.map(ask, range(128))) == {200}
