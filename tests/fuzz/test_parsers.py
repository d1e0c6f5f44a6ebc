"""Whatever a parser is given, it answers or raises its own error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.archive.lock import Lock
from ociproxy.config.file import parse_config
from ociproxy.errors import ConfigError, DigestInvalid, NameInvalid, OciProxyError
from ociproxy.fetch.oras.challenges import find_challenge, parse_challenges
from ociproxy.fetch.oras.client import api_base
from ociproxy.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    MalformedManifest,
)
from ociproxy.oci.digest import Digest
from ociproxy.oci.layout import parse_index
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, guess_media_type, parse_manifest
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference, Repository
from ociproxy.serve.exchange import ManifestPath, parse_path, requested_ranges
from ociproxy.store.ingest import Ingest
from tests.fuzz.counting import TRIED, inputs

HEX = "0123456789abcdef"
ODD = st.sampled_from(list("/:@.%-_[]?#&=+~\\\0\r\n\t é￼‮\ud800"))
TEXT = st.text(st.one_of(ODD, st.characters()), max_size=200)
NAMES = st.lists(
    st.one_of(
        st.sampled_from(["..", ".", "%2e%2e", "v2", "manifests", "blobs", "tags", "list", "_tags"]),
        st.text(st.sampled_from("abcXYZ019._-"), max_size=12),
        TEXT,
    ),
    max_size=8,
).map("/".join)
DIGESTS = st.one_of(
    st.text(HEX, min_size=64, max_size=64).map("sha256:".__add__),
    st.text(HEX, min_size=126, max_size=130).map("sha512:".__add__),
    TEXT,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, DIGESTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


def documents(*keys: str) -> st.SearchStrategy[bytes]:
    """JSON that has these keys more often than chance would, and bytes that are no JSON."""
    descriptor = st.fixed_dictionaries(
        {},
        optional={
            "mediaType": st.one_of(TEXT, st.sampled_from([OCI_MANIFEST, OCI_INDEX, "a/b"])),
            "digest": DIGESTS,
            "size": st.one_of(st.integers(), JSON),
            "platform": JSON,
            "urls": JSON,
            "annotations": JSON,
            "artifactType": JSON,
            "reference": TEXT,
            "complete": JSON,
            "platforms": JSON,
        },
    )
    value = st.one_of(JSON, descriptor, st.lists(descriptor, max_size=3))
    document = st.fixed_dictionaries({}, optional={key: value for key in keys})
    encoded = st.one_of(document, JSON).map(lambda found: json.dumps(found).encode())
    return st.one_of(encoded, st.binary(max_size=300), encoded.map(lambda raw: raw[:-1]))


@given(st.one_of(TEXT, NAMES, st.builds("{}:{}@{}".format, NAMES, TEXT, DIGESTS)))
def test_reference(text: str) -> None:
    TRIED["reference"] += 1
    try:
        reference = Reference.parse(text)
    except (NameInvalid, DigestInvalid):
        return
    assert Reference.parse(str(reference)) == reference
    assert ".." not in str(reference).split("/")


@given(TEXT, NAMES)
def test_repository(registry: str, name: str) -> None:
    TRIED["repository"] += 1
    try:
        repository = Repository.parse(registry, name)
    except NameInvalid:
        return
    assert len(repository.registry) <= 255
    assert len(repository.name) <= 255
    assert not {"", ".", ".."} & set(str(repository).split("/"))


@given(DIGESTS)
def test_digest(text: str) -> None:
    TRIED["digest"] += 1
    try:
        digest = Digest.parse(text)
    except DigestInvalid:
        return
    assert str(digest) == text
    assert digest.encoded.isalnum()


@given(
    st.sampled_from(["manifests", "blobs", "tags", "referrers", ""]),
    NAMES,
    st.one_of(DIGESTS, TEXT, st.just("list")),
    st.one_of(st.none(), TEXT, st.just("quay.io")),
)
def test_request_target(kind: str, name: str, last: str, namespace: str | None) -> None:
    TRIED["request target"] += 1
    query = "" if namespace is None else f"?ns={namespace}"
    raw = f"/v2/{name}/{kind}/{last}{query}".encode("utf-8", "surrogatepass").decode("latin-1")
    try:
        target = parse_path(raw, "docker.io")
    except OciProxyError:
        return
    assert ".." not in str(target.repository).split("/")
    if isinstance(target, ManifestPath):
        assert "/" not in (target.reference.tag or "")


@given(
    st.one_of(
        TEXT,
        st.builds("bytes={}-{}".format, st.integers(), st.integers()),
        st.builds("bytes={}".format, st.text("0123456789-, ", max_size=60)),
        st.builds("{}={}-".format, TEXT, st.integers()),
    ),
    st.integers(min_value=0, max_value=2**63),
)
def test_range(header: str, size: int) -> None:
    TRIED["range"] += 1
    header = header.encode("utf-8", "replace").decode()
    request = make_mocked_request("GET", "/v2/app/blobs/x", headers={"Range": header})
    wanted = requested_ranges(request, size)
    assert all(0 <= start < stop <= size for start, stop in wanted or ())
    assert len(wanted or ()) <= 1 or sum(stop - start for start, stop in wanted or ()) <= size


@given(
    st.one_of(
        TEXT,
        st.lists(
            st.one_of(
                st.sampled_from(
                    ["Bearer ", "Basic ", "realm=", ",", '"', "\\", "=", " ", "scope="]
                ),
                TEXT,
            ),
            max_size=12,
        ).map("".join),
    )
)
def test_challenge(header: str) -> None:
    TRIED["Www-Authenticate"] += 1
    for challenge in parse_challenges(header):
        assert challenge.scheme == challenge.scheme.lower()
    challenge_found = find_challenge(header)
    assert challenge_found is None or challenge_found.scheme in ("basic", "bearer")


@pytest.mark.parametrize(
    "media_type", [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST, "a/b"]
)
@inputs(2500)
@given(raw=documents("schemaVersion", "mediaType", "config", "layers", "manifests", "subject"))
def test_manifest(media_type: str, raw: bytes) -> None:
    TRIED["manifest"] += 1
    assert len(raw) < MANIFEST_MAX_SIZE
    for parse in (lambda: parse_manifest(raw, media_type), lambda: guess_media_type(raw)):
        try:
            found = parse()
        except MalformedManifest:
            continue
        if isinstance(found, str):
            assert found.isascii()
            assert found.isprintable()


@inputs(2500)
@given(documents("format", "images", "contents"))
def test_lock(raw: bytes) -> None:
    TRIED["lock"] += 1
    try:
        lock = Lock.parse(raw, "fuzz.lock")
    except OciProxyError as error:
        said = str(error)
    else:
        said = ""
        assert Lock.parse(lock.encode(), "again") == lock
    assert not said or "fuzz.lock" in said


@inputs(2500)
@given(documents("schemaVersion", "manifests", "mediaType"))
def test_layout_index(raw: bytes) -> None:
    TRIED["layout index"] += 1
    said = "fuzz.tar"
    try:
        parse_index(raw, "fuzz.tar")
    except OciProxyError as error:
        said = str(error)
    assert "fuzz.tar" in said


KEYS = [
    "upstreams",
    "fetch",
    "serve",
    "store",
    "tags",
    "log",
    "name",
    "auth",
    "tls",
    "user",
    "match",
]


@inputs(3000)
@given(
    st.one_of(
        TEXT,
        st.lists(
            st.one_of(
                st.sampled_from([f"{key}: " for key in KEYS]),
                st.sampled_from(
                    ["\n", "\n  ", "\n    ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!x "]
                ),
                TEXT,
            ),
            max_size=20,
        ).map("".join),
        st.recursive(
            st.one_of(TEXT, st.integers(), st.none(), st.booleans()),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXT), inner, max_size=4),
            ),
            max_leaves=10,
        ).map(json.dumps),
    )
)
def test_config(text: str) -> None:
    TRIED["config"] += 1
    try:
        parse_config(text, "fuzz.yaml")
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith("fuzz.yaml")


@given(TEXT)
def test_platform(text: str) -> None:
    TRIED["platform"] += 1
    try:
        platform = Platform.parse(text)
    except NameInvalid:
        return
    assert Platform.parse(str(platform)) == platform


@given(st.builds("{}://{}/{}".format, st.sampled_from(["http", "https"]), TEXT, NAMES))
def test_endpoint(url: str) -> None:
    TRIED["endpoint"] += 1
    try:
        base = api_base(url)
    except ValueError:
        return
    assert base.endswith("/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.one_of(
                st.builds("{} {}".format, st.integers(), st.integers()),
                st.builds("size {}".format, st.integers()),
                TEXT,
            ),
            max_size=8,
        ).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
    )
)
def test_span_journal(folder: Path, raw: bytes) -> None:
    TRIED["span journal"] += 1
    path = folder / "blob"
    path.touch()
    journal = folder / "blob.ranges"
    journal.write_bytes(raw + b"\n")
    with path.open("rb") as file:
        ingest = Ingest(path, Digest.of(b""), file.fileno(), leading=False)
        ingest.refresh()
        spans = list(ingest.ranges)
    for start, stop in spans:
        assert 0 <= start < stop
