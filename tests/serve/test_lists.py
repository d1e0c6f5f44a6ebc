"""Tags and referrers where the upstream does not answer, or not as the specification wants it."""

from __future__ import annotations

import json

import pytest

from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests.images import OCI_INDEX, Image, artifact, content, image
from tests.serve.scene import Scene
from tests.upstream_faults import HTML, Fault, too_many_requests

SBOM, SIGNATURE = "application/vnd.example.sbom.v1+json", "application/vnd.example.signature.v1"
TAGS = ("a", "b", "c", "d")


@pytest.fixture
def tagged(scene: Scene) -> Scene:
    """A mirror that has four tags of one image."""
    for tag in TAGS:
        scene.upstream.add(scene.repository, image("app"), tag=tag)
    scene.start()
    for tag in TAGS:
        scene.manifest(tag)
    return scene


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault(status=500), "upstream-unavailable"),
        (HTML, "upstream-invalid"),
        (too_many_requests(), "upstream-rate-limited"),
    ],
)
def test_cached_tags_stand_in_for_a_failing_upstream(
    tagged: Scene, fault: Fault, word: str
) -> None:
    if fault is HTML:
        # The fake upstream's lists are not content: another server answers for it.
        page = tagged.upstream.add_content("page", content(b"<html>"))
        assert page.size
        fault = Fault(redirect=f"{tagged.upstream.url}/v2/page/blobs/{page.digest}?")
    tagged.upstream.fault("/tags/list", fault)
    answer = tagged.server.get(tagged.path("tags", "list"))
    assert (answer.status, answer.json()["tags"]) == (200, list(TAGS))
    assert word in answer.cache_status


def test_no_cached_tags_stand_in_where_the_upstream_has_answered(tagged: Scene) -> None:
    """They are a shorter list, which the client would take for all tags."""
    tagged.upstream.fault("/tags/list", Fault(status=403))
    answer = tagged.server.get(tagged.path("tags", "list"))
    assert (answer.status, answer.json()["errors"][0]["code"]) == (403, "DENIED")
    for status, page, told in ((401, 2, 403), (404, 3, 404), (405, 4, 502)):
        tagged.upstream.fault("/tags/list", Fault(status=status))
        assert tagged.server.get(f"{tagged.path('tags', 'list')}&n={page}").status == told


@pytest.mark.parametrize("code", ["PAGINATION_NUMBER_INVALID", "UNSUPPORTED"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_page_that_the_upstream_refuses_is_refused_whatever_is_cached(
    scene: Scene, cached: bool, code: str
) -> None:
    """Cached tags are a shorter list that the client would take for all of them."""
    for tag in TAGS:
        scene.upstream.add(scene.repository, image("app"), tag=tag)
    server = scene.start()
    if cached:
        scene.manifest("a")
    scene.upstream.fault("/tags/list", Fault(status=400, code=code))
    answer = server.get(f"{scene.path('tags', 'list')}&n=5000")
    [error] = answer.json()["errors"]
    assert (answer.status, error["code"]) == (400, "PAGINATION_NUMBER_INVALID")
    assert code in error["message"]
    scene.upstream.heal()
    assert server.get(f"{scene.path('tags', 'list')}&n=3").json()["tags"] == ["a", "b", "c"]


@pytest.mark.parametrize("status", [404, 500])
def test_no_cached_tag_stands_in_for_no_list(scene: Scene, status: int) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    server = scene.start()
    scene.manifest(app.digest)
    scene.upstream.fault("/tags/list", Fault(status=status))
    answer = server.get(scene.path("tags", "list"))
    assert answer.status == (404 if status == 404 else 502)


def test_cached_tags_are_paged(tagged: Scene) -> None:
    tagged.server.restart(args=["--offline"])
    path = tagged.path("tags", "list")
    first = tagged.server.get(f"{path}&n=3")
    assert first.json()["tags"] == ["a", "b", "c"]
    following = first.headers["link"].partition(">")[0].removeprefix("<")
    last = tagged.server.get(following)
    assert last.json()["tags"] == ["d"]
    assert "link" not in last.headers
    assert tagged.server.get(f"{path}&n=0").json()["tags"] == []
    assert tagged.server.get(f"{path}&last=b").json()["tags"] == ["c", "d"]


def test_tags_of_what_nobody_knows(scene: Scene) -> None:
    scene.start()
    for _ in ("online", "offline"):
        answer = scene.server.get(scene.path("tags", "list"))
        [error] = answer.json()["errors"]
        assert (answer.status, error["code"]) == (404, "NAME_UNKNOWN")
        scene.server.restart(args=["--offline"])


@pytest.mark.parametrize("offline", [True, False])
def test_referrers_by_artifact_type(scene: Scene, offline: bool) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    made = {kind: artifact(app.top, artifact_type=kind) for kind in (SBOM, SIGNATURE)}
    for each in made.values():
        scene.upstream.add(scene.repository, each)
    scene.start()
    if offline:
        scene.manifest("v1")
        for each in made.values():
            scene.manifest(each.digest)
        scene.server.restart(args=["--offline"])
    path = scene.path("referrers", app.digest)
    everything = scene.server.get(path)
    assert {m["digest"] for m in everything.json()["manifests"]} == {
        each.digest for each in made.values()
    }
    assert "oci-filters-applied" not in everything.headers
    some = scene.server.get(f"{path}&artifactType={SIGNATURE}")
    [found] = some.json()["manifests"]
    assert (found["digest"], found["artifactType"]) == (made[SIGNATURE].digest, SIGNATURE)
    assert found["annotations"] == {"org.example.kind": "test"}
    assert some.headers["oci-filters-applied"] == "artifactType"
    for written in (SBOM, SBOM.replace("+", "%2B")):  # as clients write it, and as a form does
        [found] = scene.server.get(f"{path}&artifactType={written}").json()["manifests"]
        assert found["artifactType"] == SBOM


@pytest.mark.parametrize("is_index", [True, False])
@pytest.mark.parametrize(
    "fault", [*(Fault(status=s) for s in (400, 401, 403, 404, 405, 406, 410, 501)), HTML]
)
def test_the_fallback_tag_is_read_where_there_is_no_api(
    scene: Scene, is_index: bool, fault: Fault
) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    listed = [
        {**artifact(app.top, artifact_type=kind).top.descriptor(), "artifactType": kind}
        for kind in (SBOM, SIGNATURE)
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    raw = json.dumps(document).encode()
    index = content(raw, OCI_INDEX) if is_index else image("no index").top
    tag = app.digest.replace(":", "-")
    scene.upstream.add_content(scene.repository, index)
    scene.upstream._tags.setdefault(scene.repository, {})[tag] = index.digest
    scene.upstream.fault("/referrers/", fault)
    scene.start()
    path = scene.path("referrers", app.digest)
    answer = scene.server.get(f"{path}&artifactType={SBOM}")
    assert answer.status == 200
    assert answer.headers["content-type"] == OCI_INDEX
    assert answer.json()["manifests"] == (listed[:1] if is_index else [])


@pytest.mark.parametrize(
    "page", ["next_page=gAAA%3D%3D&n=2", "n=2&last=a%2Bb%2Fc%3D%3D", "token=a+b%20c&empty=&flag"]
)
def test_an_upstreams_own_name_of_the_next_page_comes_back_as_it_was(
    tagged: Scene, page: str
) -> None:
    """Encoded once, in our link and in what the client then asks for."""
    link = f'</v2/{tagged.repository}/tags/list?{page}>; rel="next"'
    tagged.upstream.fault("/tags/list", Fault(headers={"Link": link}), times=1)
    first = tagged.server.get(
        f"/v2/{tagged.repository}/tags/list?n=2&ns={tagged.upstream.registry}"
    )
    following = f"/v2/{tagged.repository}/tags/list?{page}&ns={tagged.upstream.registry}"
    assert first.headers["link"] == f'<{following}>; rel="next"'
    second = tagged.server.get(following)
    assert second.status == 200
    assert [request.raw_query for request in tagged.upstream.seen("/tags/list")] == ["n=2", page]


def test_a_page_that_only_the_upstream_knows_is_not_made_of_cached_tags(tagged: Scene) -> None:
    """The client would get the first page again, and again."""
    tagged.upstream.fault("/tags/list", Fault(status=500))
    path = f"/v2/{tagged.repository}/tags/list?ns={tagged.upstream.registry}"
    assert tagged.server.get(f"{path}&n=2").status == 200
    assert tagged.server.get(f"{path}&next_page=gAAA").status == 502


def test_the_next_page_of_referrers_is_filtered_as_the_first(scene: Scene) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    link = f'</v2/{scene.repository}/referrers/{app.digest}?page=gA%3D>; rel="next"'
    unfiltered = {"Link": link, "OCI-Filters-Applied": ""}
    scene.upstream.fault("/referrers/", Fault(headers=unfiltered), times=1)
    scene.start()
    path = scene.path("referrers", app.digest)
    answer = scene.server.get(f"{path}&artifactType=application/a%2Bb")
    following = f"page=gA%3D&artifactType=application%2Fa%2Bb&ns={scene.upstream.registry}"
    assert answer.headers["link"].startswith(f"<{path.partition('?')[0]}?{following}>")
    scene.server.get(f"{path.partition('?')[0]}?{following}")
    asked = [request.raw_query for request in scene.upstream.seen("/referrers/")]
    assert asked == [
        "artifactType=application/a%2Bb",
        "page=gA%3D&artifactType=application%2Fa%2Bb",
    ]


def test_the_fallback_tag_of_a_sha512_subject_has_64_digits(scene: Scene) -> None:
    subject = content(b"{}", OCI_INDEX, algorithm="sha512")
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [subject.descriptor()]}
    listing = content(json.dumps(document).encode(), OCI_INDEX)
    scene.upstream.add(scene.repository, Image(listing), tag=f"sha512-{subject.encoded[:64]}")
    scene.upstream.fault("/referrers/", Fault(status=404))
    scene.start()
    answer = scene.server.get(scene.path("referrers", subject.digest))
    assert answer.body == listing.data


@pytest.mark.parametrize("tag_fault", [Fault(status=404), Fault(status=500), Fault(status=403)])
def test_known_referrers_stand_in_where_the_fallback_tag_cannot_be_read_either(
    scene: Scene, tag_fault: Fault
) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    signature = scene.upstream.add(scene.repository, artifact(app.top))
    scene.start()
    scene.manifest(signature.digest)
    scene.upstream.fault("/referrers/", Fault(status=405))
    scene.upstream.fault("/manifests/", tag_fault)
    answer = scene.server.get(scene.path("referrers", app.digest))
    assert [m["digest"] for m in answer.json()["manifests"]] == [signature.digest]
    assert "fwd=stale" in answer.cache_status


@pytest.mark.parametrize("away", [False, True])
def test_an_odd_entry_of_a_fallback_tag_hides_no_other(scene: Scene, away: bool) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    signed = {**artifact(app.top).top.descriptor(), "artifactType": SIGNATURE}
    odd = {"digest": artifact(app.top, data=b"[]").digest, "artifactType": SIGNATURE}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [odd, signed]}
    index = Image(content(json.dumps(document).encode(), OCI_INDEX))
    scene.upstream.add(scene.repository, index, tag=app.digest.replace(":", "-"))
    scene.upstream.fault("/referrers/", Fault(status=404))
    server = scene.start()
    path = scene.path("referrers", app.digest)
    assert server.get(path).body == index.top.data
    if away:
        server.restart(args=["--offline"])
    assert server.get(f"{path}&artifactType={SIGNATURE}").json()["manifests"] == [signed]


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=403), Fault(drop=True)])
def test_known_referrers_stand_in_for_a_failing_upstream(scene: Scene, fault: Fault) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    signature = scene.upstream.add(scene.repository, artifact(app.top))
    scene.start()
    scene.manifest(signature.digest)
    scene.upstream.fault("/referrers/", fault)
    answer = scene.server.get(scene.path("referrers", app.digest))
    assert answer.status == 200
    assert [m["digest"] for m in answer.json()["manifests"]] == [signature.digest]
    assert "fwd=stale" in answer.cache_status


def test_a_repository_that_shares_an_image_has_its_signatures_offline(scene: Scene) -> None:
    """The first repository's pull stored the bytes, and the second one's found them there."""
    app = image("app")
    signature = artifact(app.top)
    scene.start()
    for name in ("team/one", "team/two"):
        scene.upstream.add(name, app, tag="v1")
        scene.upstream.add(name, signature)
        for each in (*app.all_content(), *signature.all_content()):
            kind = "manifests" if each in (app.top, signature.top) else "blobs"
            assert scene.server.get(scene.path(kind, each.digest, repository=name)).status == 200
    assert scene.upstream.count("team/two/manifests/", "GET") == 0
    records = f"refs/{scene.upstream.registry}/team/two/_manifests"
    for digest in (app.digest, signature.digest):
        scene.server.wait_for_file(f"{records}/{digest}")
    scene.upstream.stop_listening()
    scene.server.restart(args=["--offline"])
    for name in ("team/one", "team/two"):
        answer = scene.server.get(scene.path("referrers", app.digest, repository=name))
        assert [each["digest"] for each in answer.json()["manifests"]] == [signature.digest]
    answer = scene.server.get(scene.path("referrers", app.digest, repository="team/three"))
    assert answer.json()["manifests"] == []
    listed = {str(entry.reference) for entry in inventory(Store(scene.server.store))}
    registry = scene.upstream.registry
    assert {f"{registry}/{name}@{app.digest}" for name in ("team/one", "team/two")} <= listed


def test_a_tag_that_means_another_repositorys_image_is_that_repositorys_too(scene: Scene) -> None:
    app = image("app")
    for name in ("team/one", "team/two"):
        scene.upstream.add(name, app, tag="v1")
    server = scene.start()
    assert server.get(scene.path("manifests", "v1", repository="team/one")).status == 200
    path = scene.path("manifests", "v1", repository="team/two")
    assert server.head(path).status == 200
    assert server.get(path).cache_status == "ociproxy; hit"
    kept = f"refs/{scene.upstream.registry}/team/two/_manifests/{app.digest}"
    server.wait_for_file(kept)


@pytest.mark.parametrize("away", ["offline", "down"])
def test_the_fallback_tag_that_was_stored_lists_referrers_while_the_upstream_is_away(
    scene: Scene, away: str
) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    signed = artifact(app.top, artifact_type=SIGNATURE)
    listed = [{**signed.top.descriptor(), "artifactType": SIGNATURE}]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    index = Image(content(json.dumps(document).encode(), OCI_INDEX))
    scene.upstream.add(scene.repository, index, tag=app.digest.replace(":", "-"))
    scene.upstream.fault("/referrers/", Fault(status=404))
    server = scene.start()
    path = scene.path("referrers", app.digest)
    assert server.get(path).json()["manifests"] == listed
    scene.upstream.stop_listening()
    if away == "offline":
        server.restart(args=["--offline"])
    for query, found in (("", listed), (SIGNATURE, listed), (SBOM, [])):
        answer = server.get(f"{path}&artifactType={query}" if query else path)
        assert (answer.status, answer.json()["manifests"]) == (200, found)
