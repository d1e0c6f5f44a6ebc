"""The fake upstream does what it is told: tests that rely on it would otherwise prove nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
import requests

from tests.images import OCI_INDEX, artifact, image, multi_platform, random_blob
from tests.parts.certificates import Authority
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import HTML, Fault, too_many_requests

IDENTITY = {"Accept-Encoding": "identity"}


def get(url: str, **arguments: object) -> requests.Response:
    with requests.Session() as session:
        return session.get(url, timeout=10, **arguments)  # type: ignore[arg-type]


def test_serves_an_index_by_tag_and_its_content_by_digest(upstream: FakeUpstream) -> None:
    pushed = upstream.add("team/app", multi_platform(), tag="V1")
    answer = get(f"{upstream.url}/v2/team/app/manifests/V1")
    assert answer.content == pushed.top.data
    assert answer.headers["Content-Type"] == OCI_INDEX
    assert answer.headers["Docker-Content-Digest"] == pushed.digest
    for blob in pushed.blobs:
        assert get(f"{upstream.url}/v2/team/app/blobs/{blob.digest}").content == blob.data
    assert upstream.count("/manifests/") == 1
    assert upstream.bytes_sent("/blobs/") == sum(blob.size for blob in pushed.blobs)


def test_unknown_things_are_404(upstream: FakeUpstream) -> None:
    upstream.add("team/app", image(), tag="v1")
    for path in ("team/app/manifests/v2", "other/manifests/v1", "team/app/blobs/sha256:0"):
        assert get(f"{upstream.url}/v2/{path}").status_code == 404


def test_range_and_head(upstream: FakeUpstream) -> None:
    blob = upstream.add_content("r", random_blob(1000))
    url = f"{upstream.url}/v2/r/blobs/{blob.digest}"
    part = get(url, headers={"Range": "bytes=990-"})
    assert (part.status_code, part.content) == (206, blob.data[990:])
    assert part.headers["Content-Range"] == "bytes 990-999/1000"
    assert get(url, headers={"Range": "bytes=1000-"}).status_code == 416
    with requests.Session() as session:
        assert session.head(url, timeout=10).headers["Content-Length"] == "1000"
    upstream.fault("/blobs/", Fault(no_range=True))
    assert get(url, headers={"Range": "bytes=990-"}).content == blob.data


def test_queued_faults_go_first_and_are_used_up(upstream: FakeUpstream) -> None:
    upstream.add("r", image(), tag="v1")
    url = f"{upstream.url}/v2/r/manifests/v1"
    upstream.fault("/manifests/", Fault(status=500))
    upstream.fault("/manifests/", too_many_requests("9"), times=1)
    throttled = get(url)
    assert (throttled.status_code, throttled.headers["Retry-After"]) == (429, "9")
    assert [get(url).status_code for _ in range(2)] == [500, 500]
    upstream.heal()
    assert get(url).status_code == 200
    upstream.fault("/manifests/", HTML)
    assert get(url).headers["Content-Type"].startswith("text/html")


def test_cut_flip_and_wrong_lengths(upstream: FakeUpstream) -> None:
    blob = upstream.add_content("r", random_blob(300_000))
    url = f"{upstream.url}/v2/r/blobs/{blob.digest}"
    upstream.fault("/blobs/", Fault(cut_after=100_001), times=1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        get(url)
    assert upstream.bytes_sent() == 100_001
    upstream.fault("/blobs/", Fault(flip_at=7), times=1)
    wrong = get(url).content
    assert len(wrong) == blob.size
    assert [at for at in range(blob.size) if wrong[at] != blob.data[at]] == [7]
    upstream.fault("/blobs/", Fault(length_delta=-5), times=1)
    assert get(url).content == blob.data[:-5]
    upstream.fault("/blobs/", Fault(length_delta=5), times=1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        get(url)
    upstream.fault("/blobs/", Fault(chunked=True), times=1)
    answer = get(url)
    assert answer.content == blob.data
    assert "Content-Length" not in answer.headers
    upstream.fault("/blobs/", Fault(drop=True), times=1)
    with pytest.raises(requests.exceptions.ConnectionError):
        get(url)


def test_stall_holds_until_released(upstream: FakeUpstream) -> None:
    blob = upstream.add_content("r", random_blob(200_000))
    upstream.fault("/blobs/", Fault(stall_after=1000))
    url = f"{upstream.url}/v2/r/blobs/{blob.digest}"
    with requests.Session() as session, session.get(url, stream=True, timeout=10) as answer:
        assert answer.raw.read(1000) == blob.data[:1000]
        assert upstream.bytes_sent() == 1000
        upstream.release()
        assert answer.raw.read() == blob.data[1000:]


def test_slow_body_and_slow_headers(upstream: FakeUpstream) -> None:
    blob = upstream.add_content("r", random_blob(50_000))
    url = f"{upstream.url}/v2/r/blobs/{blob.digest}"
    upstream.fault("/blobs/", Fault(rate=100_000), times=1)
    begin = time.monotonic()
    assert get(url).content == blob.data
    assert 0.4 < time.monotonic() - begin < 2
    upstream.fault("/blobs/", Fault(delay=30), times=1)
    threading.Timer(0.3, upstream.release).start()
    begin = time.monotonic()
    assert get(url).content == blob.data
    assert 0.2 < time.monotonic() - begin < 5


def test_compression_only_for_those_who_accept_it(upstream: FakeUpstream) -> None:
    upstream.add("r", image(), tag="v1")
    upstream.fault("/manifests/", Fault(compress="accepted"))
    url = f"{upstream.url}/v2/r/manifests/v1"
    assert get(url).headers["Content-Encoding"] == "gzip"
    assert "Content-Encoding" not in get(url, headers=IDENTITY).headers


def test_redirect_to_another_host(make_upstream: Callable[..., FakeUpstream]) -> None:
    ann = BasicAuth("ann", "pw")
    upstream, storage = make_upstream(auth=ann), make_upstream(host="127.0.0.2")
    blob = random_blob(10)
    upstream.add_content("r", blob)
    storage.add_content("r", blob)
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    url = f"{upstream.url}/v2/r/blobs/{blob.digest}"
    assert get(url).status_code == 401
    assert get(url, auth=("ann", "pw")).content == blob.data
    assert storage.count("/blobs/") == 1
    assert upstream.bytes_sent() == 0


def test_token_is_good_for_one_repository_and_a_while(upstream: FakeUpstream) -> None:
    secret = BasicAuth("ann", "pw")
    auth = TokenAuth(credentials=secret, answer_as="access_token")
    for name in ("a/x", "a/y"):
        upstream.add(name, image(name), tag="v1")
        upstream.protect(name, auth)
    url = f"{upstream.url}/v2/a/x/manifests/v1"
    challenge = get(url)
    assert challenge.status_code == 401
    expected = f'realm="{upstream.url}/token"'
    assert expected in challenge.headers["WWW-Authenticate"]
    scope = {"scope": "repository:a/x:pull", "service": auth.service}
    assert get(f"{upstream.url}/token", params=scope).status_code == 401
    answer = get(f"{upstream.url}/token", params=scope, auth=("ann", "pw"))
    bearer = {"Authorization": "Bearer " + answer.json()["access_token"]}
    assert get(url, headers=bearer).status_code == 200
    elsewhere = get(url.replace("a/x", "a/y"), headers=bearer)
    assert 'error="insufficient_scope"' in elsewhere.headers["WWW-Authenticate"]
    auth.expire_all()
    assert 'error="invalid_token"' in get(url, headers=bearer).headers["WWW-Authenticate"]
    assert [name for name, _ in auth.issued] == ["a/x"]


def test_basic_auth(make_upstream: Callable[..., FakeUpstream]) -> None:
    upstream = make_upstream(auth=BasicAuth("ann", "pw"))
    upstream.add("r", image(), tag="v1")
    url = f"{upstream.url}/v2/r/manifests/v1"
    assert get(url).headers["WWW-Authenticate"].startswith("Basic ")
    assert get(url, auth=("ann", "pw")).status_code == 200


def test_tags_by_pages_and_referrers(make_upstream: Callable[..., FakeUpstream]) -> None:
    upstream = make_upstream()
    base = f"{upstream.url}/v2/team/app"
    pushed = image()
    for tag in ("a", "b", "c"):
        upstream.add("team/app", pushed, tag=tag)
    first = get(f"{base}/tags/list?n=2")
    assert first.json()["tags"] == ["a", "b"]
    assert get(upstream.url + first.links["next"]["url"]).json()["tags"] == ["c"]
    sbom = upstream.add("team/app", artifact(pushed.top))
    upstream.add("team/app", artifact(pushed.top, artifact_type="application/x.other"))
    url = f"{base}/referrers/{pushed.digest}"
    assert len(get(url).json()["manifests"]) == 2
    only = get(url, params={"artifactType": "application/vnd.example.sbom.v1"})
    assert [each["digest"] for each in only.json()["manifests"]] == [sbom.digest]
    without = make_upstream(referrers=False)
    assert get(f"{without.url}/v2/team/app/referrers/{pushed.digest}").status_code == 404


def test_an_upstream_can_go_away_and_come_back(upstream: FakeUpstream) -> None:
    upstream.add("r", image(), tag="v1")
    url = f"{upstream.url}/v2/r/manifests/v1"
    upstream.stop_listening()
    with pytest.raises(requests.exceptions.ConnectionError):
        get(url)
    upstream.listen_again()
    assert get(url).status_code == 200


@pytest.mark.parametrize("ask_client", [False, True])
def test_over_tls_and_mtls(
    ask_client: bool, make_upstream: Callable[..., FakeUpstream], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    upstream = make_upstream(tls=authority.server_context(ask_client=ask_client))
    upstream.add("r", image(), tag="v1")
    url, trusted = f"{upstream.url}/v2/r/manifests/v1", str(authority.ca)
    client = (str(authority.client_cert), str(authority.client_key))
    assert get(url, verify=trusted, cert=client).status_code == 200
    if ask_client:
        with pytest.raises(requests.exceptions.ConnectionError):
            get(url, verify=trusted)


async def test_blocks_no_event_loop_itself(upstream: FakeUpstream) -> None:
    pushed = upstream.add("r", image(layer_size=300_000), tag="v1")
    upstream.fault("/blobs/", Fault(rate=10_000_000))
    async with aiohttp.ClientSession(upstream.url) as client:
        for blob in pushed.blobs:
            async with client.get(f"/v2/r/blobs/{blob.digest}") as answer:
                assert await answer.read() == blob.data
    upstream.release()
