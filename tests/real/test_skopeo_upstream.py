"""A mirror that fetches by skopeo, between containerd and docker-registry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.images import Image, image_of, layer, multi_platform, random_bytes
from tests.parts.certificates import Authority
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool, run
from tests.real.conftest import TAG
from tests.real.test_upstreams import (
    CREDENTIALS,
    REPOSITORY,
    TRUST,
    assert_refused,
    assert_serves,
    trusting,
)
from tests.real.test_upstreams import TAG as V1
from tests.server import PROGRAM, ROOT, Mirror, upstream_entry

pytestmark = pytest.mark.usefixtures("_needs_skopeo")


@pytest.fixture
def _needs_skopeo() -> None:
    require_tool("skopeo")


def by_skopeo(registry: Registry, **more: object) -> dict[str, object]:
    return upstream_entry(registry.url, backend="skopeo", **more)


def blob_gets(registry: Registry, digest: str) -> int:
    return len(re.findall(rf'"GET /v2/\S+/blobs/{digest} HTTP/1.1" 200', registry.log()))


@pytest.mark.parametrize("running", [True, False])
def test_containerd_pulls_every_kind_of_image(
    registry: Registry,
    held: dict[str, Image],
    mirror: Callable[..., Mirror],
    containerd: Containerd,
    running: bool,
) -> None:
    server = mirror({"upstreams": [by_skopeo(registry)]})
    containerd.use_mirror(server.url)
    for repository, each in held.items():
        reference = f"{registry.name}/{repository}:{TAG}"
        assert containerd.pull(reference, all_platforms=True) == each.digest
        assert containerd.holds(each)
    if not running:
        registry.stop()
        containerd.wipe()
        for repository, each in held.items():
            reference = f"{registry.name}/{repository}:{TAG}"
            assert containerd.pull(reference, all_platforms=True) == each.digest
            assert containerd.holds(each)
    assert "Traceback" not in server.log()


def test_a_shared_layer_is_fetched_once(tmp_path: Path, mirror: Callable[..., Mirror]) -> None:
    """Eight images at once, of two layers that all have and one of their own."""
    shared = [layer({f"shared-{n}": random_bytes(2_000_000, seed=n)}) for n in range(2)]
    images = [
        image_of([*shared, layer({f"own-{n}": random_bytes(10_000, seed=n)})]) for n in range(8)
    ]
    with Registry(tmp_path / "registry") as registry:
        for n, each in enumerate(images):
            registry.push(f"team/app-{n}", each, tag=TAG)
        server = mirror({"upstreams": [by_skopeo(registry)]})

        def pull(n: int) -> None:
            answer = server.manifest(registry.name, f"team/app-{n}", TAG)
            assert answer.body == images[n].top.data
            for blob in images[n].blobs:
                assert server.blob(registry.name, f"team/app-{n}", blob.digest).body == blob.data

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pull, range(8)))
        for one in shared:
            assert blob_gets(registry, one.content.digest) == 1
        # What is stored is not fetched with another image either.
        registry.push("team/more", image_of([shared[0], layer({"more": b"more"})]), tag=TAG)
        more = server.manifest(registry.name, "team/more", TAG).json()
        for described in (more["config"], *more["layers"]):
            server.blob(registry.name, "team/more", described["digest"])
        assert blob_gets(registry, shared[0].content.digest) == 1
        assert list((server.store / "pulls").glob("skopeo-*")) != []
        server.stop()
        assert [p for p in (server.store / "pulls").iterdir()] == []


@pytest.fixture(scope="session")
def pushed() -> Image:
    return multi_platform("matrix", platforms=("linux/amd64", "linux/arm64"), docker=True)


@pytest.mark.parametrize("client", [False, True], ids=["one-way", "mTLS"])
@pytest.mark.parametrize("trust", TRUST)
def test_https(
    trust: str,
    client: bool,
    tmp_path: Path,
    authority: Authority,
    mirror: Callable[..., Mirror],
    pushed: Image,
) -> None:
    with Registry(tmp_path / "registry", tls=authority, ask_client=client) as registry:
        registry.push(REPOSITORY, pushed, tag=V1)
        tls, env = trusting(trust, authority, client=client)
        server = mirror([by_skopeo(registry, tls=tls)], env=env)
        assert_serves(server, registry, pushed)


def test_certificates_that_are_not_accepted(
    tmp_path: Path, authority: Authority, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    stranger = Authority(tmp_path / "stranger")
    with Registry(tmp_path / "registry", tls=authority, ask_client=True) as registry:
        registry.push(REPOSITORY, pushed, tag=V1)
        pair = {"cert": str(authority.client_cert), "key": str(authority.client_key)}
        assert_refused(mirror([by_skopeo(registry, tls=pair)]), registry, 502)
        # A given CA replaces the OS store, even where that one would do.
        tls = {"ca": str(stranger.ca), **pair}
        env = {"SSL_CERT_FILE": str(authority.ca)}
        assert_refused(mirror([by_skopeo(registry, tls=tls)], env=env), registry, 502)
        # Nobody has shown a client certificate.
        tls = {"ca": str(authority.ca)}
        assert_refused(mirror([by_skopeo(registry, tls=tls)]), registry, 502)


def test_basic_auth(tmp_path: Path, mirror: Callable[..., Mirror], pushed: Image) -> None:
    user, password = CREDENTIALS
    with Registry(tmp_path / "registry", credentials=CREDENTIALS) as registry:
        registry.push(REPOSITORY, pushed, tag=V1)
        for auth in (None, {"user": user, "password": "wrong"}):
            more = {"auth": auth} if auth else {}
            assert_refused(mirror([by_skopeo(registry, **more)]), registry, 403)
        auth = {"user": user, "password": password}
        server = mirror([by_skopeo(registry, auth=auth)])
        assert_serves(server, registry, pushed)
        assert password not in server.log()
        # It is asked no more: what is stored is served, and a miss says why it is one.
        gone = server.manifest(registry.name, REPOSITORY, "other")
        assert (gone.status, "connection refused" in gone.body.decode()) == (502, True)


def test_endpoint_below_another_repository(
    tmp_path: Path, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    with Registry(tmp_path / "registry") as registry:
        registry.push("hub/library/app", pushed, tag=TAG)
        hub = {"name": "docker.io", "endpoint": f"{registry.url}/hub", "backend": "skopeo"}
        server = mirror([hub])
        assert server.manifest("docker.io", "library/app", TAG).body == pushed.top.data
        for child in pushed.manifests:
            assert server.manifest("docker.io", "library/app", child.digest).body == child.data
        for blob in pushed.blobs:
            assert server.blob("docker.io", "library/app", blob.digest).body == blob.data


def test_tags_list_in_pages(
    registry: Registry, held: dict[str, Image], mirror: Callable[..., Mirror]
) -> None:
    repository, each = next(iter(held.items()))
    for tag in ("a", "b"):
        registry.push(repository, each, tag=tag)
    server = mirror([by_skopeo(registry)])
    first = server.get(f"/v2/{repository}/tags/list?n=2&ns={registry.name}")
    assert first.json() == {"name": repository, "tags": [TAG, "a"]}
    assert "last=a" in first.headers["link"]
    unknown = server.get(f"/v2/no/such/tags/list?ns={registry.name}")
    assert unknown.status == 404


def test_load_with_skopeo_for_every_upstream(
    registry: Registry, held: dict[str, Image], tmp_path: Path, mirror: Callable[..., Mirror]
) -> None:
    lines = [f"{registry.name}/{repository}:{TAG}\n" for repository in held]
    (tmp_path / "list").write_text("".join(lines))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump([upstream_entry(registry.url)]))
    command: list[str | Path] = [PROGRAM, "load", "--backend", "skopeo", "--all-platforms"]
    paths = (tmp_path / "store", config, tmp_path / "list")
    options = ["--image-path", str(paths[0]), "--config-path", str(paths[1]), str(paths[2])]
    done = run(*command, "--json", *options, cwd=ROOT)
    blobs = {blob.digest: len(blob.data) for each in held.values() for blob in each.blobs}
    assert json.loads(done.stdout.splitlines()[-1])["fetched"] == sum(blobs.values())
    for each in held.values():
        for blob in each.blobs:
            assert (tmp_path / "store" / "blobs" / blob.encoded).read_bytes() == blob.data
            assert blob_gets(registry, blob.digest) == 1
    assert list((tmp_path / "store" / "pulls").iterdir()) == []
    registry.stop()
    server = mirror([by_skopeo(registry)], args=["--offline"], store=tmp_path / "store")
    for repository, each in held.items():
        assert server.manifest(registry.name, repository, TAG).body == each.top.data
    assert list((tmp_path / "store" / "pulls").iterdir()) == []
    # Without the program the command says so, before anything is asked.
    done = run(*command, *options, cwd=ROOT, env={"PATH": str(tmp_path)}, check=False)
    assert done.returncode == 2
    assert b"apt-get install skopeo" in done.stderr
