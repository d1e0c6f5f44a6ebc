"""The oras backend: the contract, and what HTTP upstreams do that it has to stand."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from requests.adapters import HTTPAdapter

from ociproxy.config.settings import Fetch, Upstream
from ociproxy.errors import (
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    UpstreamDenied,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Quota
from ociproxy.fetch.oras.backend import OrasBackend
from ociproxy.fetch.oras.client import api_base
from ociproxy.fetch.retry import retrying
from ociproxy.oci.descriptor import DOCKER_SCHEMA1_SIGNED
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import TIMEOUTS, OpenBackend, entry
from tests.fetch.contract import BackendContract, digest, read_all, reference, repository
from tests.images import (
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Content,
    content,
    image,
    multi_platform,
    random_blob,
)
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault, too_many_requests


class TestOrasBackend(BackendContract):
    def open_backend(self, upstream: FakeUpstream) -> OrasBackend:
        return OrasBackend(entry(upstream), Fetch())


@pytest.fixture
def backend(upstream: FakeUpstream, open_backend: OpenBackend) -> OrasBackend:
    return open_backend(upstream)


# Manifests


def test_resolve_is_one_head(upstream: FakeUpstream, backend: OrasBackend) -> None:
    top = upstream.add("team/app", multi_platform(), tag="v1").top
    assert backend.resolve(reference(upstream)).size == top.size
    assert [(r.method, r.status) for r in upstream.requests] == [("HEAD", 200)]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=405),
        Fault(status=501),
        Fault(digest_header=""),
        Fault(content_type="application/octet-stream"),
    ],
)
def test_resolve_asks_with_get_where_head_is_of_no_use(
    upstream: FakeUpstream, backend: OrasBackend, fault: Fault
) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    upstream.fault("/manifests/", fault, method="HEAD")
    descriptor = backend.resolve(reference(upstream))
    assert descriptor.digest == digest(top)
    assert descriptor.size == top.size
    assert descriptor.media_type == top.media_type


def test_resolve_of_a_digest_does_not_believe_another(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    top = upstream.add("team/app", image()).top
    upstream.fault("/manifests/", Fault(digest_header=content(b"other").digest))
    with pytest.raises(DigestMismatch):
        backend.resolve(reference(upstream, f"team/app@{top.digest}"))


def test_wrong_docker_content_digest(upstream: FakeUpstream, backend: OrasBackend) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    upstream.fault("/manifests/", Fault(digest_header=content(b"other").digest))
    with pytest.raises(DigestMismatch):
        backend.fetch_manifest(reference(upstream))
    by_digest = backend.fetch_manifest(reference(upstream, f"team/app@{top.digest}"))
    assert by_digest.raw == top.data


@pytest.mark.parametrize("header", ["", "nonsense", "md5:d41d8cd98f00b204e9800998ecf8427e"])
def test_unusable_docker_content_digest(
    upstream: FakeUpstream, backend: OrasBackend, header: str
) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    upstream.fault("/manifests/", Fault(digest_header=header))
    assert backend.fetch_manifest(reference(upstream)).descriptor.digest == digest(top)


def test_sha512_of_the_upstream_is_kept(upstream: FakeUpstream, backend: OrasBackend) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    named = f"sha512:{hashlib.sha512(top.data).hexdigest()}"
    upstream.fault("/manifests/", Fault(digest_header=named))
    assert str(backend.fetch_manifest(reference(upstream)).descriptor.digest) == named
    assert str(backend.resolve(reference(upstream)).digest) == named


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 501])
def test_an_upstream_that_refuses_each_head_is_asked_by_get_alone(
    upstream: FakeUpstream, backend: OrasBackend, status: int
) -> None:
    held = upstream.add("team/app", image(), tag="v1")
    upstream.fault("/v2/", Fault(status=status), method="HEAD")
    for _ in range(2):
        assert backend.resolve(reference(upstream)).digest == digest(held.top)
    assert [r.method for r in upstream.seen("/manifests/")] == ["HEAD", "GET", "GET"]
    blob = held.blobs[0]
    assert backend.stat_blob(repository(upstream), digest(blob)) == blob.size


def test_an_upstream_that_breaks_at_each_head_is_asked_by_get_alone(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    """From the second time on: one answer of 500 may be a moment's."""
    held = upstream.add("team/app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(status=500), method="HEAD", times=1)
    for _ in range(2):
        assert backend.resolve(reference(upstream)).digest == digest(held.top)
    assert methods(upstream) == ["HEAD", "GET", "HEAD"]
    upstream.requests.clear()
    upstream.fault("/manifests/", Fault(status=500), method="HEAD")
    for _ in range(3):
        assert backend.resolve(reference(upstream)).digest == digest(held.top)
    assert methods(upstream) == ["HEAD", "GET", "HEAD", "GET", "GET"]


def test_an_outage_does_not_double_the_requests(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(status=503))
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable):
            backend.resolve(reference(upstream))
    assert methods(upstream) == ["HEAD", "GET", "HEAD", "HEAD"]


def test_a_tag_that_is_gone_where_each_head_breaks_holds_up_no_other(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(status=500), method="HEAD")
    with pytest.raises(ManifestUnknown):
        backend.resolve(reference(upstream, "team/app:v2"))
    backend.resolve(reference(upstream))


def methods(upstream: FakeUpstream) -> list[str]:
    return [request.method for request in upstream.seen("/manifests/")]


def test_what_neither_head_nor_get_knows_does_not_tell_against_head(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    with pytest.raises(ManifestUnknown):
        backend.resolve(reference(upstream, "team/app:v2"))
    backend.resolve(reference(upstream))
    assert [r.method for r in upstream.seen("/manifests/v1")] == ["HEAD"]


@pytest.mark.parametrize(
    "sent", ["application/json", "text/plain; charset=utf-8", "binary/octet-stream"]
)
def test_generic_content_type(upstream: FakeUpstream, backend: OrasBackend, sent: str) -> None:
    upstream.add("team/app", multi_platform(), tag="v1")
    upstream.fault("/manifests/", Fault(content_type=sent))
    assert backend.fetch_manifest(reference(upstream)).descriptor.media_type == OCI_INDEX


def test_content_type_parameters_are_no_part_of_it(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(content_type=f"{OCI_MANIFEST}; charset=utf-8"))
    assert backend.fetch_manifest(reference(upstream)).descriptor.media_type == OCI_MANIFEST
    assert backend.resolve(reference(upstream)).media_type == OCI_MANIFEST


def test_a_manifest_is_parsed_once_on_its_way_into_the_store(
    upstream: FakeUpstream, backend: OrasBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = upstream.add("team/app", image(pad_to=3_000_000), tag="v1").top
    store = Store(tmp_path / "store")
    parsed: list[object] = []
    loads = json.loads

    def counting(text: object, **options: object) -> object:
        parsed.append(text)
        return loads(text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(json, "loads", counting)
    store.commit_manifest(repository(upstream), backend.fetch_manifest(reference(upstream)))
    assert parsed.count(top.data) == 1


def signed_schema1() -> tuple[bytes, str]:
    """The bytes, and the digest that registries give them: of the payload that was signed."""
    payload = json.dumps({"schemaVersion": 1, "name": "team/app", "tag": "v1"}, indent=3).encode()
    tail = base64.urlsafe_b64encode(payload[-2:]).decode().rstrip("=")
    length = {"formatLength": len(payload) - 2, "formatTail": tail}
    protected = base64.urlsafe_b64encode(json.dumps(length).encode()).decode().rstrip("=")
    signatures = json.dumps([{"header": {}, "signature": "x", "protected": protected}]).encode()
    raw = payload[:-2] + b',\n   "signatures": ' + signatures + payload[-2:]
    return raw, "sha256:" + hashlib.sha256(payload).hexdigest()


@pytest.mark.parametrize("by_tag", [True, False])
def test_signed_schema_1_is_refused_in_its_own_words(
    upstream: FakeUpstream, backend: OrasBackend, by_tag: bool
) -> None:
    raw, named = signed_schema1()
    upstream.add("team/app", image(), tag="v1")
    upstream.fault(
        "/manifests/", Fault(body=raw, content_type=DOCKER_SCHEMA1_SIGNED, digest_header=named)
    )
    upstream.add_content("team/app", Content(DOCKER_SCHEMA1_SIGNED, raw, named))
    wanted = "team/app:v1" if by_tag else f"team/app@{named}"
    with pytest.raises(ManifestInvalid, match="signed Docker schema 1"):
        backend.fetch_manifest(reference(upstream, wanted))


def test_nothing_is_asked_for_compressed_or_decoded(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    blob = upstream.add_content("team/app", random_blob(1000))
    upstream.fault("", Fault(compress="accepted"))
    assert backend.fetch_manifest(reference(upstream)).raw == top.data
    assert read_all(backend.open_blob(repository(upstream), digest(blob))) == blob.data
    upstream.fault("", Fault(compress="always"))
    with pytest.raises(ManifestInvalid, match="gzip"):
        backend.fetch_manifest(reference(upstream))
    stream = backend.open_blob(repository(upstream), digest(blob))
    assert stream.encoding == "gzip"
    assert gzip.decompress(read_all(stream)) == blob.data


def test_accepts_every_kind_of_manifest(upstream: FakeUpstream, backend: OrasBackend) -> None:
    upstream.add("team/app", image(), tag="v1")
    backend.fetch_manifest(reference(upstream))
    (request,) = upstream.requests
    assert OCI_INDEX in request.headers["Accept"]
    assert "*/*" in request.headers["Accept"]
    assert request.headers["User-Agent"].startswith("ociproxy/")
    assert not {"Cookie", "Authorization"} & set(request.headers)


# Blobs


def test_whole_blob_is_asked_for_without_range(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    where = (repository(upstream), digest(blob))
    read_all(backend.open_blob(*where))
    read_all(backend.open_blob(*where, start=10))
    read_all(backend.open_blob(*where, start=10, stop=20))
    ranges = [request.headers.get("Range") for request in upstream.requests]
    assert ranges == [None, "bytes=10-", "bytes=10-19"]


def test_upstream_without_ranges_starts_at_zero(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", Fault(no_range=True))
    stream = backend.open_blob(repository(upstream), digest(blob), start=500)
    assert (stream.start, stream.size) == (0, 1000)
    assert read_all(stream) == blob.data


@pytest.mark.parametrize("given", ["bytes 0-999/1000", "bytes 501-999/1000", "nonsense", ""])
def test_another_range_than_asked(upstream: FakeUpstream, backend: OrasBackend, given: str) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    wrong = Fault(status=206, body=blob.data, headers={"Content-Range": given}, no_range=True)
    upstream.fault("/blobs/", wrong)
    with pytest.raises(UpstreamUnavailable, match="range"):
        backend.open_blob(repository(upstream), digest(blob), start=500)


def test_range_behind_the_end(upstream: FakeUpstream, backend: OrasBackend) -> None:
    """Whoever asks for it does not know the size: the whole blob tells."""
    blob = upstream.add_content("team/app", random_blob(1000))
    stream = backend.open_blob(repository(upstream), digest(blob), start=1000)
    assert (stream.start, stream.size) == (0, 1000)
    assert read_all(stream) == blob.data


def test_blob_of_unknown_length(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True))
    stream = backend.open_blob(repository(upstream), digest(blob))
    assert stream.size is None
    assert read_all(stream) == blob.data
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True, cut_after=100_000))
    with pytest.raises(UpstreamUnavailable, match="before the end"):
        read_all(backend.open_blob(repository(upstream), digest(blob)))


def test_a_blob_whole_and_in_part(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    where = (repository(upstream), digest(blob))
    for start, stop in ((0, None), (0, 1), (1, None), (100_000, 200_000), (299_999, 300_000)):
        stream = backend.open_blob(*where, start=start, stop=stop)
        assert stream.size == blob.size
        data = read_all(stream)
        assert data == blob.data[stream.start : stream.stop]
        assert stream.start == start
        assert stream.stop == (blob.size if stop is None else stop)


def test_a_range_of_an_empty_blob(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", content(b"", OCI_LAYER))
    assert read_all(backend.open_blob(repository(upstream), digest(blob), stop=1000)) == b""


@pytest.mark.parametrize("cut", [0, 1, 100_000, 299_999])
def test_a_body_that_is_cut(upstream: FakeUpstream, backend: OrasBackend, cut: int) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(cut_after=cut))
    stream = backend.open_blob(repository(upstream), digest(blob))
    with pytest.raises(UpstreamUnavailable):
        read_all(stream)


def test_abort_ends_a_read(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(stall_after=100_000))
    stream = backend.open_blob(repository(upstream), digest(blob))
    timer = threading.Timer(0.2, stream.abort)
    timer.start()
    with pytest.raises(UpstreamUnavailable):
        read_all(stream)
    timer.join()
    stream.abort()
    with pytest.raises(UpstreamUnavailable):
        stream.read(1)
    stream.close()


@pytest.mark.parametrize("fault", [Fault(status=405), Fault(chunked=True)])
def test_stat_without_a_useful_head(
    upstream: FakeUpstream, backend: OrasBackend, fault: Fault
) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", fault, method="HEAD")
    assert backend.stat_blob(repository(upstream), digest(blob)) == 1000
    assert upstream.bytes_sent() <= 1


@pytest.mark.parametrize("status", [400, 401, 403, 405, 500, 501, 503])
def test_a_blob_whose_heads_are_refused_or_break_has_its_size_by_get_alone(
    upstream: FakeUpstream, backend: OrasBackend, status: int
) -> None:
    """From the second time on where it is a 5xx: one may be a moment's."""
    held = upstream.add("team/app", image(), tag="v1")
    blob = held.blobs[0]
    upstream.fault("/blobs/", Fault(status=status), method="HEAD")
    for _ in range(3):
        assert backend.stat_blob(repository(upstream), digest(blob)) == blob.size
    heads = upstream.count("/blobs/", "HEAD")
    assert heads == (2 if status in (500, 503) else 1)
    assert upstream.count("/blobs/", "GET") == 3
    assert upstream.bytes_sent("/blobs/") <= 3
    # HEADs of manifests are another matter: they save a quota.
    backend.resolve(reference(upstream))
    assert methods(upstream) == ["HEAD"]


def test_an_outage_does_not_double_the_requests_for_blobs(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", Fault(status=503))
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable):
            backend.stat_blob(repository(upstream), digest(blob))
    assert [each.method for each in upstream.requests] == ["HEAD", "GET", "HEAD", "HEAD"]
    upstream.heal()
    assert backend.stat_blob(repository(upstream), digest(blob)) == 1000


def test_stat_where_storage_signed_for_get_only(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream, storage = make_upstream(), make_upstream()
    blob = storage.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    storage.fault("/blobs/", Fault(status=403), method="HEAD")
    assert open_backend(upstream).stat_blob(repository(upstream), digest(blob)) == 1000


def test_cut_says_how_far_it_came(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(cut_after=100_001))
    with pytest.raises(UpstreamUnavailable, match="closed before the end of the body"):
        read_all(backend.open_blob(repository(upstream), digest(blob)))


def test_reset_connection(upstream: FakeUpstream, backend: OrasBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(cut_after=100_000, reset=True))
    with pytest.raises(UpstreamUnavailable):
        read_all(backend.open_blob(repository(upstream), digest(blob)))


# Time


def test_stall(upstream: FakeUpstream, open_backend: OpenBackend) -> None:
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(stall_after=100_000))
    backend = open_backend(upstream, timeouts=replace(TIMEOUTS, stall=0.3))
    stream = backend.open_blob(repository(upstream), digest(blob))
    started = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match=r"timed out after 0\.3 s without data") as caught:
        read_all(stream)
    assert caught.value.timed_out
    assert 0.2 < time.monotonic() - started < 1.5


def test_body_may_pause_longer_than_headers_may_take(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = upstream.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", Fault(rate=1000))
    backend = open_backend(upstream, timeouts=replace(TIMEOUTS, headers=0.05))
    assert read_all(backend.open_blob(repository(upstream), digest(blob))) == blob.data


def test_late_headers(upstream: FakeUpstream, open_backend: OpenBackend) -> None:
    upstream.fault("", Fault(delay=20))
    backend = open_backend(upstream, timeouts=replace(TIMEOUTS, headers=0.3))
    with pytest.raises(UpstreamUnavailable, match=r"0\.3 s waiting for headers") as caught:
        backend.fetch_manifest(reference(upstream))
    assert (caught.value.timed_out, caught.value.unreachable) == (True, False)


# Failures


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=503), Fault(drop=True), too_many_requests()]
)
def test_no_retry_inside(upstream: FakeUpstream, backend: OrasBackend, fault: Fault) -> None:
    upstream.fault("", fault)
    with pytest.raises((UpstreamUnavailable, UpstreamRateLimited)):
        backend.fetch_manifest(reference(upstream))
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UpstreamInvalid),
        (405, UpstreamInvalid),
        (451, UpstreamInvalid),
        (501, UpstreamInvalid),
        (408, UpstreamUnavailable),
        (500, UpstreamUnavailable),
        (503, UpstreamUnavailable),
    ],
)
def test_only_what_may_be_better_the_next_time_is_worth_another_try(
    upstream: FakeUpstream, backend: OrasBackend, status: int, kind: type[UpstreamError]
) -> None:
    upstream.fault("/manifests/", Fault(status=status), method="GET")
    with pytest.raises(kind, match=str(status)) as caught:
        retrying(tries=3, wait_max=0.0, stopped=threading.Event())(
            backend.fetch_manifest, reference(upstream)
        )
    assert len(upstream.requests) == (3 if kind is UpstreamUnavailable else 1)
    assert caught.value.negative_cacheable is (kind is UpstreamInvalid)


def test_what_the_upstream_says_of_its_rate_limit_is_kept(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    assert backend.quota is None
    said = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "76;w=21600"}
    upstream.fault("/manifests/", Fault(headers=said), times=1)
    backend.resolve(reference(upstream))
    assert backend.quota == Quota(limit=100, remaining=76, window=21600)
    backend.resolve(reference(upstream))
    assert backend.quota == Quota(limit=100, remaining=76, window=21600)
    said = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "0;w=21600"}
    upstream.fault("/manifests/", Fault(status=429, headers=said), times=1)
    with pytest.raises(UpstreamRateLimited):
        backend.resolve(reference(upstream))
    assert backend.quota is not None
    assert backend.quota.is_low


def test_reason_quotes_the_upstream_and_no_secret(
    upstream: FakeUpstream, backend: OrasBackend
) -> None:
    upstream.fault("", Fault(status=503))
    with pytest.raises(UpstreamUnavailable) as caught:
        backend.fetch_listing(repository(upstream), "tags/list", "signature=secret")
    text = str(caught.value)
    assert "answered 503: UNKNOWN: the fake upstream was told so" in text
    assert "/v2/team/app/tags/list" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 1, 1),
        ("999999", 3600, 3600),
        ("soon", 30, 30),
        ("-5", 30, 30),
        ("", 30, 30),
        ("date", 50, 61),
    ],
)
def test_retry_after(
    upstream: FakeUpstream, backend: OrasBackend, header: str, least: float, most: float
) -> None:
    value = formatdate(time.time() + 60, usegmt=True) if header == "date" else header
    upstream.fault("", too_many_requests(value))
    with pytest.raises(UpstreamRateLimited) as caught:
        backend.fetch_manifest(reference(upstream))
    assert least <= caught.value.retry_after <= most


def test_denied(upstream: FakeUpstream, backend: OrasBackend) -> None:
    for status in (401, 403):
        upstream.fault("", Fault(status=status))
        with pytest.raises(UpstreamDenied) as caught:
            backend.fetch_manifest(reference(upstream))
        assert caught.value.status == status


def test_name_that_does_not_resolve() -> None:
    backend = OrasBackend(Upstream(name="registry.invalid", timeouts=TIMEOUTS), Fetch())
    with pytest.raises(UpstreamUnavailable, match="name does not resolve") as caught:
        backend.fetch_listing(Repository.parse("registry.invalid", "app"), "tags/list", "")
    assert caught.value.unreachable


@pytest.mark.parametrize("rel", ['"next"', '"prev next"', '"NEXT http://a.example/rel"', "next"])
def test_the_next_page_may_have_further_relations(
    upstream: FakeUpstream, backend: OrasBackend, rel: str
) -> None:
    upstream.add("team/app", image(), tag="v1")
    link = f'</v2/team/app/tags/list?n=1>; rel="prev", </v2/team/app/tags/list?last=v1>; rel={rel}'
    upstream.fault("/tags/list", Fault(headers={"Link": link}))
    listing = backend.fetch_listing(repository(upstream), "tags/list", "")
    assert listing.next_query == "last=v1"


# Endpoints and connections


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://quay.io", "https://quay.io/v2/"),
        ("http://[::1]:5000", "http://[::1]:5000/v2/"),
        ("https://harbor.example/hub", "https://harbor.example/v2/hub/"),
        ("https://harbor.example/a/Hub/", "https://harbor.example/v2/a/Hub/"),
        ("https://harbor.example/v2/hub", "https://harbor.example/v2/hub/"),
        ("https://harbor.example/v2", "https://harbor.example/v2/"),
        ("https://harbor.example/v2x", "https://harbor.example/v2/v2x/"),
    ],
)
def test_api_base(url: str, base: str) -> None:
    assert api_base(url) == base


def test_endpoint_in_place_of_the_name(upstream: FakeUpstream) -> None:
    top = upstream.add("hub/library/nginx", image(), tag="v1").top
    hub = Upstream(name="docker.io", endpoint=f"{upstream.url}/hub", timeouts=TIMEOUTS)
    backend = OrasBackend(hub, Fetch())
    holder = backend.fetch_manifest(Reference.parse("nginx:v1"))
    backend.close()
    assert holder.raw == top.data


def test_connections_are_used_again(upstream: FakeUpstream, backend: OrasBackend) -> None:
    top = upstream.add("team/app", image(), tag="v1").top
    for _ in range(3):
        backend.fetch_manifest(reference(upstream))
        backend.resolve(reference(upstream))
        with pytest.raises(ManifestUnknown):
            backend.fetch_manifest(reference(upstream, "team/app:other"))
        read_all(backend.open_blob(repository(upstream), Digest.parse(top.digest)))
    adapter = backend._client._session.get_adapter(upstream.url)
    assert isinstance(adapter, HTTPAdapter)
    pools = adapter.poolmanager.pools
    assert [pools[key].num_connections for key in pools.keys()] == [1]  # noqa: SIM118


def test_state_per_repository_is_bounded(upstream: FakeUpstream, backend: OrasBackend) -> None:
    for n in range(1030):
        backend._client._registry_of(repository(upstream, f"team/app-{n}"))
    assert backend._client._registry_of.cache_info().currsize == 1024


def test_redirects_are_followed_and_counted(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream, storage = make_upstream(), make_upstream()
    blob = storage.add_content("team/app", random_blob(1000))
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    backend = open_backend(upstream)
    stream = backend.open_blob(repository(upstream), digest(blob), start=10)
    assert read_all(stream) == blob.data[10:]
    storage.fault("/blobs/", Fault(redirect=upstream.url))
    with pytest.raises(UpstreamInvalid, match="circles"):
        backend.open_blob(repository(upstream), digest(blob))
    assert len(upstream.requests) + len(storage.requests) == 2 + 6
