"""Private content stays private: what one repository has is not had by naming another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import layouts
from tests.archive.importing import Import
from tests.images import (
    OCI_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    Image,
    artifact,
    content,
    image,
    multi_platform,
    random_blob,
)
from tests.load.loading import Load
from tests.server import Answer, Mirror, upstream_entry
from tests.upstream import FakeUpstream

MakeMirror = Callable[..., Mirror]
MakeUpstream = Callable[..., FakeUpstream]


def isolated(upstream: FakeUpstream) -> dict[str, object]:
    return upstream_entry(upstream.url, isolation="repository")


def pull(server: Mirror, upstream: FakeUpstream, name: str, held: Image) -> None:
    """All of it, as a client does."""
    for each in held.all_content():
        kind = "blobs" if each in held.blobs else "manifests"
        answer = server.get(f"/v2/{name}/{kind}/{each.digest}?ns={upstream.registry}")
        assert (answer.status, answer.body) == (200, each.data)
    for blob in held.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def everything(server: Mirror, registry: str, name: str, held: Image) -> list[Answer]:
    """Every way to ask for a part of it by digest."""
    answers = []
    for each in held.all_content():
        kind = "blobs" if each in held.blobs else "manifests"
        path = f"/v2/{name}/{kind}/{each.digest}?ns={registry}"
        answers += [server.get(path), server.head(path), server.get(path, {"Range": "bytes=0-9"})]
    return answers


@pytest.mark.parametrize("offline", [False, True])
def test_another_repository_does_not_have_it(
    mirror: MakeMirror, upstream: FakeUpstream, offline: bool
) -> None:
    secret = upstream.add("team/secret", image("secret"), tag="v1")
    upstream.add("team/open", image("open"), tag="v1")
    server = mirror({"upstreams": [isolated(upstream)]})
    pull(server, upstream, "team/secret", secret)
    assert server.manifest(upstream.registry, "team/open", "v1").status == 200
    if offline:
        upstream.stop_listening()
        server.restart(args=["--offline"])
    for name in ("team/open", "team/nothing"):
        answers = everything(server, upstream.registry, name, secret)
        assert {answer.status for answer in answers} == {404}
    pull(server, upstream, "team/secret", secret)


def test_without_isolation_bytes_are_bytes(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    shared = upstream.add("team/secret", image("secret"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    pull(server, upstream, "team/secret", shared)
    answers = everything(server, upstream.registry, "team/open", shared)
    assert {answer.status for answer in answers} == {200, 206}


def test_what_both_have_is_downloaded_once(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    shared = image("shared")
    for name in ("team/one", "team/two"):
        upstream.add(name, shared, tag="v1")
    server = mirror({"upstreams": [isolated(upstream)]})
    for name in ("team/one", "team/two"):
        assert server.manifest(upstream.registry, name, "v1").status == 200
        pull(server, upstream, name, shared)
    assert upstream.count("/blobs/", "GET") == len(shared.blobs)
    assert upstream.count("/blobs/", "HEAD") == 0
    assert upstream.count("/manifests/", "GET") == 2  # each repository's own consent


def test_a_blob_whose_manifest_is_not_here_needs_the_upstreams_word(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("team/one", random_blob(1000))
    upstream.add_content("team/two", blob)
    server = mirror({"upstreams": [isolated(upstream)]})
    for name in ("team/one", "team/two", "team/two"):
        assert server.blob(upstream.registry, name, blob.digest).body == blob.data
    assert server.blob(upstream.registry, "team/three", blob.digest).status == 404
    assert upstream.count("team/one/blobs/", "GET") == 1
    assert upstream.count("team/two/blobs/", "GET") == 0
    assert upstream.count("team/two/blobs/", "HEAD") == 1


def test_children_of_an_index_and_referrers_are_served_offline_where_they_were_pulled(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = upstream.add("team/app", multi_platform(), tag="v1")
    sbom = upstream.add("team/app", artifact(app.top))
    server = mirror({"upstreams": [isolated(upstream)]})
    pull(server, upstream, "team/app", app)
    pull(server, upstream, "team/app", sbom)
    upstream.stop_listening()
    server.restart(args=["--offline"])
    pull(server, upstream, "team/app", app)
    pull(server, upstream, "team/app", sbom)
    path = f"/v2/{{}}/referrers/{app.digest}?ns={upstream.registry}"
    assert len(server.get(path.format("team/app")).json()["manifests"]) == 1
    assert server.get(path.format("team/other")).json()["manifests"] == []
    for held in (app, sbom):
        answers = everything(server, upstream.registry, "team/other", held)
        assert {answer.status for answer in answers} == {404}


def test_a_tag_that_a_head_resolved_does_not_open_another_repositorys_manifest(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    upstream.add("team/secret", app, tag="v1")
    upstream.add("team/open", app, tag="v1")
    server = mirror({"upstreams": [isolated(upstream)]})
    pull(server, upstream, "team/secret", app)
    head = server.head(f"/v2/team/open/manifests/v1?ns={upstream.registry}")
    assert head.status == 200
    asked = upstream.count("team/open/manifests/", "GET")
    assert server.manifest(upstream.registry, "team/open", "v1").body == app.top.data
    assert upstream.count("team/open/manifests/", "GET") == asked + 1


def test_no_other_registry_opens_it_either(mirror: MakeMirror, make_upstream: MakeUpstream) -> None:
    private, public = make_upstream(), make_upstream()
    secret = private.add("team/secret", image("secret"), tag="v1")
    server = mirror({"upstreams": [isolated(private), upstream_entry(public.url)]})
    pull(server, private, "team/secret", secret)
    answers = everything(server, public.registry, "team/secret", secret)
    assert {answer.status for answer in answers} == {404}
    # The owner of an unlisted registry can claim to have anything, so none is served.
    answers = everything(server, "evil.example", "team/secret", secret)
    assert {answer.status for answer in answers} == {403}
    assert b"isolates repositories" in answers[0].body


def test_a_subject_is_no_claim(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    """Registries take a manifest whose subject they do not have."""
    secret = upstream.add("team/secret", image("secret"), tag="v1")
    claims = artifact(secret.top)
    upstream.add("team/open", claims, tag="v1")
    server = mirror({"upstreams": [isolated(upstream)]})
    pull(server, upstream, "team/secret", secret)
    pull(server, upstream, "team/open", claims)
    answers = everything(server, upstream.registry, "team/open", secret)
    assert {answer.status for answer in answers} == {404}


@pytest.mark.parametrize("by", ["load", "skopeo", "preload"])
def test_a_load_opens_no_manifest_that_its_repository_lacks_at_the_upstream(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path, by: str
) -> None:
    """An index may name any digest, and a registry need not have what its indexes name."""
    secret = upstream.add("team/secret", multi_platform("secret"), tag="v1")
    upstream.add("team/open", Image(secret.top), tag="v1")
    config: dict[str, object] = {"upstreams": [isolated(upstream)]}
    if by == "skopeo" and shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    load = Load(tmp_path / "load", config=config)
    assert load.run(load.write(f"{upstream.registry}/team/secret:v1"), "--all-platforms").code == 0
    listed = load.write(f"{upstream.registry}/team/open:v1 platform=linux/amd64")
    if by != "preload":
        backend = "skopeo" if by == "skopeo" else "oras"
        assert load.run(listed, "--backend", backend).code == 3
        server = mirror(config, store=load.store)
    else:
        server = mirror(config, store=load.store, args=["--preload-images", listed])
        server.wait_for_log("image not loaded")
    children = Image(secret.manifests[0], secret.manifests[1:], secret.blobs)
    answers = everything(server, upstream.registry, "team/open", children)
    assert {answer.status for answer in answers} == {404}
    pull(server, upstream, "team/secret", secret)


def test_a_load_opens_no_referrer_that_its_repository_lacks_at_the_upstream(
    mirror: MakeMirror, make_upstream: MakeUpstream, tmp_path: Path
) -> None:
    upstream = make_upstream(referrers=False)
    app = upstream.add("team/open", image("app"), tag="v1")
    secret = artifact(app.top)
    upstream.add("team/secret", secret, tag="v1")
    listing = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [secret.top.descriptor()]}
    fallback = Image(content(json.dumps(listing).encode(), OCI_INDEX))
    upstream.add("team/open", fallback, tag=app.digest.replace(":", "-"))
    config: dict[str, object] = {"upstreams": [isolated(upstream)]}
    load = Load(tmp_path / "load", config=config)
    assert load.run(load.write(f"{upstream.registry}/team/secret:v1")).code == 0
    listed = load.write(f"{upstream.registry}/team/open:v1")
    assert load.run(listed, "--referrers").code == 0
    assert upstream.count(f"/team/open/manifests/{secret.digest}") == 1
    server = mirror(config, store=load.store)
    answers = everything(server, upstream.registry, "team/open", secret)
    assert {answer.status for answer in answers} == {404}


def claims_of(secret: Image) -> dict[str, Image]:
    """What an archive can name to be given the layers of a secret image."""
    config = content(b"{}", "application/vnd.oci.image.config.v1+json")
    named = [blob.descriptor() for blob in secret.blobs]
    other = "application/vnd.example.other+json"
    documents: dict[str, dict[str, object]] = {
        "image": {"mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": named},
        "artifact": {"mediaType": OCI_ARTIFACT, "blobs": named},
        "schema 1": {
            "schemaVersion": 1,
            "fsLayers": [{"blobSum": each["digest"]} for each in named],
        },
        "index": {"mediaType": OCI_INDEX, "manifests": [], "layers": named},
        "another kind": {"mediaType": other, "layers": named},
    }
    tops = {
        kind: content(json.dumps({"schemaVersion": 2, **each}).encode(), str(each.get("mediaType")))
        for kind, each in documents.items()
    }
    return {kind: Image(top, blobs=(config,)) for kind, top in tops.items()}


@pytest.mark.parametrize(
    "kind", ["itself", "its children", *claims_of(image()), "a lie about the layer"]
)
def test_an_import_opens_nothing_that_did_not_come_with_the_archive(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path, kind: str
) -> None:
    secret = upstream.add("team/secret", multi_platform("secret"), tag="v1")
    config: dict[str, object] = {"upstreams": [isolated(upstream)]}
    load = Load(tmp_path, config=config)
    assert load.run(load.write(f"{upstream.registry}/team/secret:v1"), "--all-platforms").code == 0
    replaced: dict[str, bytes] = {}
    without = secret.blobs
    if kind == "itself":
        claim, without = secret, tuple(secret.all_content())
    elif kind == "its children":
        claim, without = secret, (*secret.manifests, *secret.blobs)
    elif kind == "a lie about the layer":
        claim, without = secret, ()
        replaced = {blob.digest: b"not the layer" for blob in secret.blobs}
    else:
        claim = claims_of(secret)[kind]
    name = f"{upstream.registry}/team/open:v1"
    members = layouts.members({name: claim}, without=without, replaced=replaced)
    job = Import(tmp_path)
    done = job.run("--config-path", load.config, layouts.write_tar(tmp_path / "a.tar", members))
    assert (done.code, done.statuses) == (5, {name: "incomplete"})
    server = mirror(config, store=job.store, args=["--offline"])
    answers = everything(server, upstream.registry, "team/open", secret)
    assert {answer.status for answer in answers} == {404}
    pull(server, upstream, "team/secret", secret)


def test_an_import_opens_no_stored_manifest_whose_blobs_alone_came(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """All that a secret manifest says may be in its annotations: its blobs are known to many."""
    secret = upstream.add("team/secret", image("secret"), tag="v1")
    config: dict[str, object] = {"upstreams": [isolated(upstream)]}
    load = Load(tmp_path, config=config)
    assert load.run(load.write(f"{upstream.registry}/team/secret:v1")).code == 0
    name = f"{upstream.registry}/team/open:v1"
    members = layouts.members({name: secret}, without=(secret.top,))
    job = Import(tmp_path)
    done = job.run("--config-path", load.config, layouts.write_tar(tmp_path / "a.tar", members))
    assert (done.code, done.statuses) == (5, {name: "incomplete"})
    server = mirror(config, store=job.store, args=["--offline"])
    answer = server.manifest(upstream.registry, "team/open", secret.digest)
    assert answer.status == 404


def test_an_import_gives_a_repository_what_came_with_the_archive(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path
) -> None:
    shared = upstream.add("team/one", multi_platform("shared"), tag="v1")
    config: dict[str, object] = {"upstreams": [isolated(upstream)]}
    load = Load(tmp_path, config=config)
    assert load.run(load.write(f"{upstream.registry}/team/one:v1"), "--all-platforms").code == 0
    job = Import(tmp_path)
    whole = layouts.members({f"{upstream.registry}/team/two:v1": shared})
    # What the repository has need not come again, as with a delta.
    again = layouts.members({f"{upstream.registry}/team/two:v2": shared}, without=shared.blobs)
    for number, members in enumerate((whole, again)):
        path = layouts.write_tar(tmp_path / f"{number}.tar", members)
        assert job.run("--config-path", load.config, path).code == 0
    server = mirror(config, store=job.store, args=["--offline"])
    pull(server, upstream, "team/two", shared)
    answers = everything(server, upstream.registry, "team/three", shared)
    assert {answer.status for answer in answers} == {404}


def test_a_bundle_gives_a_repository_what_came_with_it(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path
) -> None:
    name = f"{upstream.registry}/team/app:v1"
    app, secret = multi_platform("app"), image("secret")
    bundle = layouts.write_tar(tmp_path / "a.tar", layouts.members({name: app}))
    # Another one names what only the store has, and has other bytes in the layer's place.
    lies = {secret.blobs[1].digest: b"not the layer"}
    claim = layouts.members(
        {f"{upstream.registry}/team/open:v1": secret}, without=secret.blobs[:1], replaced=lies
    )
    hostile = layouts.write_tar(tmp_path / "b.tar", claim)
    upstream.add("team/secret", secret, tag="v1")
    server = mirror({"upstreams": [isolated(upstream)]})
    pull(server, upstream, "team/secret", secret)
    upstream.stop_listening()
    server.restart(args=["--offline", "--bundle", str(bundle), "--bundle", str(hostile)])
    for _ in range(2):  # a second time from what is remembered
        assert server.manifest(upstream.registry, "team/app", "v1").body == app.top.data
        for each in app.all_content():
            kind = "blobs" if each in app.blobs else "manifests"
            answer = server.get(f"/v2/team/app/{kind}/{each.digest}?ns={upstream.registry}")
            assert (answer.status, answer.body) == (200, each.data)
    answers = everything(server, upstream.registry, "team/other", app)
    for blob in secret.blobs:
        answers.append(server.blob(upstream.registry, "team/open", blob.digest))
    assert {answer.status for answer in answers} == {404}
    pull(server, upstream, "team/secret", secret)


def test_without_isolation_an_import_takes_layers_from_the_store(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    shared = upstream.add("team/one", multi_platform("shared"), tag="v1")
    load = Load(tmp_path, upstream.url)
    assert load.run(load.write(f"{upstream.registry}/team/one:v1"), "--all-platforms").code == 0
    members = layouts.members({f"{upstream.registry}/team/two:v1": shared}, without=shared.blobs)
    path = layouts.write_tar(tmp_path / "a.tar", members)
    assert Import(tmp_path).run("--config-path", load.config, path).code == 0
