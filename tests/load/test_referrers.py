"""`--referrers`: signatures, SBOMs and attestations come along, in every way they are attached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ociproxy.cli.main import main
from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import (
    OCI_INDEX,
    Content,
    Image,
    artifact,
    attested_index,
    content,
    image,
    multi_platform,
)
from tests.load.loading import Load
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import HTML, Fault

NO_API = (400, 401, 403, 404, 405, 406, 410, 501)
"""Answers of registries that do not have the referrers API."""


def serve_offline(mirror: Callable[..., Mirror], load: Load, upstream: FakeUpstream) -> Mirror:
    upstream.stop_listening()
    return mirror([upstream_entry(upstream.url)], args=["--offline"], store=load.store)


def test_referrers_of_index_and_image_and_of_each_other(
    upstream: FakeUpstream, load: Load, mirror: Callable[..., Mirror]
) -> None:
    app = upstream.add("team/app", multi_platform("app"), tag="v1")
    amd64, arm64, _ = app.manifests
    signature = upstream.add("team/app", artifact(app.top, artifact_type="application/sig"))
    sbom = upstream.add("team/app", artifact(amd64, artifact_type="application/sbom"))
    signed_sbom = upstream.add("team/app", artifact(sbom.top, artifact_type="application/sig"))
    other = upstream.add("team/app", artifact(arm64, artifact_type="application/sbom"))
    listed = load.write(f"{upstream.registry}/team/app:v1")
    assert load.run(listed, "--arch", "amd64").code == 0
    assert not load.has(signature)
    assert load.run(listed, "--arch", "amd64", "--referrers").code == 0
    assert all(load.has(each) for each in (signature, sbom, signed_sbom))
    assert not load.has(other)
    server = serve_offline(mirror, load, upstream)
    for subject, referrer in ((app.top, signature), (amd64, sbom), (sbom.top, signed_sbom)):
        path = f"/v2/team/app/referrers/{subject.digest}?ns={upstream.registry}"
        (entry,) = server.get(path).json()["manifests"]
        assert entry["digest"] == referrer.digest


def fallback(referrers: list[Image]) -> Content:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [each.top.descriptor() for each in referrers],
    }
    return content(json.dumps(document).encode(), OCI_INDEX)


def test_a_fallback_tag_that_is_an_image_lists_nothing(
    make_upstream: Callable[..., FakeUpstream], tmp_path: Path
) -> None:
    """Whoever may push can give any image such a name."""
    upstream = make_upstream(referrers=False)
    load = Load(tmp_path / "load", upstream.url)
    app = upstream.add("team/app", image("app"), tag="v1")
    other = upstream.add("team/app", image("other"), tag=app.digest.replace(":", "-"))
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers")
    assert done.code == 0, done.stderr
    assert load.has(app)
    assert not load.has(other)


@pytest.mark.parametrize("fault", [*(Fault(status=s) for s in NO_API), HTML])
def test_fallback_tag_where_the_api_is_missing(
    upstream: FakeUpstream, load: Load, mirror: Callable[..., Mirror], fault: Fault
) -> None:
    upstream.fault("/referrers/", fault)
    app = upstream.add("team/app", image("app"), tag="v1")
    sbom = upstream.add("team/app", artifact(app.top))
    gone = artifact(app.top, data=b"gone")
    listing = fallback([sbom, gone])
    upstream.add("team/app", Image(listing), tag=f"sha256-{app.top.encoded}")
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers")
    assert done.code == 0
    assert load.has(sbom)
    assert load.tag(f"{upstream.registry}/team/app:sha256-{app.top.encoded}") == listing.digest
    server = serve_offline(mirror, load, upstream)
    path = f"/v2/team/app/referrers/{app.digest}?ns={upstream.registry}"
    assert [each["digest"] for each in server.get(path).json()["manifests"]] == [sbom.digest]
    tag = server.manifest(upstream.registry, "team/app", f"sha256-{app.top.encoded}")
    assert tag.body == listing.data


@pytest.mark.parametrize("backend", ["oras", "skopeo"])
@pytest.mark.parametrize("status", [401, 403])
def test_an_image_whose_signature_tags_are_refused_is_loaded(
    upstream: FakeUpstream, load: Load, backend: str, status: int
) -> None:
    """Registries that refuse a tag which they do not have, and those where it is private."""
    app = upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/manifests/sha256-", Fault(status=status))
    upstream.fault("/referrers/", Fault(status=404))
    listed = load.write(f"{upstream.registry}/team/app:v1")
    done = load.run(listed, "--referrers", "--backend", backend)
    assert done.code == 0, done.stderr
    assert load.has(app)
    if backend == "oras":  # skopeo tells no status
        assert f"{upstream.registry}/team/app:v1: 4 referrers or signature tags were" in done.stderr


@pytest.mark.parametrize("status", [403, 404])
def test_an_image_whose_listed_signature_is_refused_is_loaded(
    upstream: FakeUpstream, load: Load, status: int
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    signature = upstream.add("team/app", artifact(app.top))
    upstream.fault(signature.digest, Fault(status=status))
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers")
    assert done.code == 0, done.stderr
    assert load.has(app)
    assert "1 referrer or signature tag was refused, and is left out: " in done.stderr
    assert signature.digest in done.stderr


@pytest.mark.parametrize("status", [401, 404])
def test_an_image_whose_signature_has_a_refused_blob_is_loaded(
    upstream: FakeUpstream, load: Load, status: int
) -> None:
    """Its manifest is readable. What needs the blob is left out, and its tag; not what else there
    is."""
    app = upstream.add("team/app", image("app"), tag="v1")
    listed = upstream.add("team/app", artifact(app.top, data=b"signed"))
    tag = f"sha256-{app.top.encoded}.sig"
    tagged = upstream.add("team/app", image("tagged", layers=1), tag=tag)
    sbom = upstream.add("team/app", artifact(app.top, data=b"sbom"))
    for signature in (listed, tagged):
        upstream.fault(signature.blobs[-1].digest, Fault(status=status))
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers")
    assert done.code == 0, done.stderr
    assert load.has(app)
    assert load.has(sbom)
    assert not any(is_published(load, signature) for signature in (listed, tagged))
    assert load.tag(f"{upstream.registry}/team/app:{tag}") is None
    assert "2 referrers or signature tags were refused, and are left out: " in done.stderr


def is_published(load: Load, made: Image) -> bool:
    return Store(load.store).manifests.find(Digest.parse(made.digest)) is not None


def test_pages_of_referrers_that_lead_in_a_circle_end(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    link = f'</v2/team/app/referrers/{app.digest}?page=gA%3D%3D>; rel="next"'
    upstream.fault("/referrers/", Fault(headers={"Link": link}))
    assert load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers").code == 0
    asked = [request.raw_query for request in upstream.seen("/referrers/")]
    assert asked == ["", "page=gA%3D%3D"]


@pytest.mark.parametrize("suffix", ["sig", "att", "sbom"])
def test_cosign_tags(upstream: FakeUpstream, load: Load, suffix: str) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    tag = f"sha256-{app.top.encoded}.{suffix}"
    attached = upstream.add("team/app", image("attached"), tag=tag)
    assert load.run(load.write(f"{upstream.registry}/team/app:v1"), "--referrers").code == 0
    assert load.has(attached)
    assert load.tag(f"{upstream.registry}/team/app:{tag}") == attached.digest


def test_buildkit_attestations_in_the_index(upstream: FakeUpstream, load: Load) -> None:
    """Docker from 29.1 on pulls those of its platform: where they are missing, `list` says so."""
    images = {each: image("app", platform=each) for each in ("linux/amd64", "linux/arm64")}
    made, about = attested_index(images)
    amd64, arm64 = about.values()
    upstream.add("team/app", made, tag="v1")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    assert load.run(listed, "--arch", "amd64").code == 0
    assert not load.has(amd64)
    ((entry,), shown) = listing(load)
    assert (entry["complete"], entry["unstoredAttestations"]) == (
        True,
        [amd64.digest],
    )
    assert " yes, unattested " in shown.stdout
    assert "1 image lacks attestations" in shown.stderr
    assert load.run(listed, "--arch", "amd64", "--referrers").code == 0
    ((entry,), shown) = listing(load)
    assert entry["unstoredAttestations"] == []
    assert " yes " in shown.stdout
    assert "attestations" not in shown.stderr
    assert load.has(amd64)
    assert not load.has(arm64)


def listing(load: Load) -> tuple[list[dict[str, Any]], Result]:
    """What `list` says of the store: as JSON, and as a table."""
    words = ["list", "--image-path", str(load.store)]
    as_json = CliRunner().invoke(main, [*words, "--format", "json"])
    return json.loads(as_json.stdout), CliRunner().invoke(main, words)


def test_image_waits_for_its_referrers(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    signature = upstream.add("team/app", artifact(app.top))
    upstream.fault(f"/manifests/{signature.digest}", Fault(flip_at=0), times=1)
    name = f"{upstream.registry}/team/app:v1"
    assert load.run(load.write(name), "--referrers").code == 3
    assert load.tag(name) is None
    assert load.run(load.write(name), "--referrers").code == 0
    assert load.has(app)
