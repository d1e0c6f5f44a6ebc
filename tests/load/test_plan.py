"""`load --plan`: what a load would take, before it takes it."""

from __future__ import annotations

import pytest

from tests.images import image, multi_platform
from tests.load.loading import Load, lines_of
from tests.parts.tools import require_tool
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


def test_plan_stores_nothing(upstream: FakeUpstream, load: Load) -> None:
    a = upstream.add("team/a", image("same", layers=2, layer_size=50_000), tag="v1")
    upstream.add("team/b", a, tag="v1")
    names = [f"{upstream.registry}/team/{name}:v1" for name in "ab"]
    done = load.run(load.write(*names), "--plan", "--json")
    assert done.code == 0
    (plan,) = done.events("plan")
    blobs = sum(blob.size for blob in a.blobs)
    assert [each["new"] for each in plan["images"]] == [blobs, blobs]
    assert (plan["size"], plan["new"]) == (blobs, blobs)
    assert plan["free"] > 0
    (config, *_) = a.blobs
    assert {request.path for request in upstream.seen("/blobs/")} == {
        f"/v2/team/{name}/blobs/{config.digest}" for name in "ab"
    }
    assert not load.store.exists()
    assert load.run(load.write(*names)).code == 0
    shown = load.run(load.write(*names), "--plan")
    assert "0 bytes to fetch" in shown.stdout
    assert names[0] in shown.stdout


def test_plan_of_a_store_changes_nothing_in_it(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/old", image("old"), tag="v1")
    upstream.add("team/new", image("new"), tag="v1")
    names = [f"{upstream.registry}/team/{name}:v1" for name in ("old", "new")]
    assert load.run(load.write(names[0])).code == 0

    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in load.store.rglob("*")}

    before = state()
    shown = load.run(load.write(*names), "--plan", "--lock", str(load.folder / "lock"))
    assert shown.code == 0
    assert [line.split()[2] for line in shown.stdout.splitlines()[1:3]] == ["linux/amd64"] * 2
    assert state() == before


@pytest.mark.parametrize("backend", ["oras", "skopeo"])
@pytest.mark.parametrize("plan", [["--plan"], []])
def test_a_wrong_platform_costs_no_layer(
    upstream: FakeUpstream, load: Load, plan: list[str], backend: str
) -> None:
    if backend == "skopeo":
        require_tool("skopeo")
    upstream.add("team/app", image("app", layer_size=50_000), tag="v1")
    listed = load.write(f"{upstream.registry}/team/app:v1 platform=linux/s390x")
    done = load.run(listed, *plan, "--backend", backend)
    assert done.code == 3
    assert "lacks linux/s390x; it is for linux/amd64" in done.stderr
    assert upstream.bytes_sent("/blobs/") < 5_000


def test_plan_says_what_a_load_takes_of_a_quota_and_what_is_left(
    upstream: FakeUpstream, load: Load
) -> None:
    many = upstream.add("team/many", multi_platform("many"), tag="v1")
    upstream.add("team/one", image("one"), tag="v1")
    left = {"ratelimit-limit": "10;w=21600", "ratelimit-remaining": "3;w=21600"}
    upstream.fault("/manifests/", Fault(headers=left))
    names = load.write(*(f"{upstream.registry}/team/{name}:v1" for name in ("many", "one")))
    # An index, its image for one platform, and an image.
    shown = load.run(names, "--plan", "--platform", "linux/amd64")
    assert shown.stdout.splitlines()[-1] == (f"{upstream.registry}: 3 pulls, 3 left of 10 in 6h")
    (plan,) = load.run(names, "--plan", "--json", "--all-platforms").events("plan")
    needed = 2 + len(many.manifests)
    assert plan["pulls"] == [
        {
            "registry": upstream.registry,
            "needed": needed,
            "remaining": 3,
            "limit": 10,
            "window": 21600,
        }
    ]
    shown = load.run(names, "--plan", "--all-platforms")
    assert shown.stdout.endswith(f": {needed} pulls, 3 left of 10 in 6h: NOT ENOUGH\n")

    # The load takes as many as the plan said, and then a plan needs none: a HEAD is no pull.
    before = pulls_of(upstream)
    assert load.run(names, "--all-platforms").code == 0
    assert pulls_of(upstream) - before == needed
    assert "pulls" not in load.run(names, "--plan", "--all-platforms").stdout


def pulls_of(upstream: FakeUpstream) -> int:
    requests = upstream.requests
    return sum(each.method == "GET" and "/manifests/" in each.path for each in requests)


def test_found_images_are_no_failures_of_a_plan(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    names = [f"{upstream.registry}/team/app:{tag}" for tag in ("v1", "v2")]
    failures = load.folder / "failures.txt"
    done = load.run(load.write(*names), "--plan", "--failures", str(failures))
    assert done.code == 3
    assert "\n1 image, 1 failed: " in done.stdout
    (failed,) = lines_of(failures)
    assert failed.startswith(f"{names[1]} ")
