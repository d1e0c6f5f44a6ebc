"""A client makes up names, and each of them costs the store nothing."""

from __future__ import annotations

from collections.abc import Callable

from tests.attack.conftest import assert_quiet
from tests.images import image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

MakeMirror = Callable[..., Mirror]


def test_names_that_a_client_makes_up_are_not_recorded(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app"), tag="v1")
    upstream.add("copy", app)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    for number in range(20):
        answer = server.manifest(upstream.registry, f"made/up-{number}", app.digest)
        assert answer.body == app.top.data
    # The upstream has it under this name. It is recorded last, so the others were asked for before.
    assert server.manifest(upstream.registry, "copy", app.digest).body == app.top.data
    names = server.store / "refs" / upstream.registry
    server.wait_for_file(f"refs/{upstream.registry}/copy/_manifests/{app.digest}")
    assert sorted(each.name for each in names.iterdir()) == ["app", "copy"]
    assert_quiet(server)
