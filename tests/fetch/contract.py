"""What any backend must do: a backend's test file inherits these tests and opens its backend."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from ociproxy.config.settings import Fetch
from ociproxy.errors import (
    BlobUnknown,
    DigestMismatch,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    SizeMismatch,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Backend, BlobStream
from ociproxy.fetch.download.assembly import State
from ociproxy.fetch.download.download import Download
from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.store import Store
from tests.images import (
    DOCKER_MANIFEST,
    OCI_LAYER,
    OCI_MANIFEST,
    Content,
    Image,
    Layer,
    artifact,
    content,
    image,
    image_of,
    multi_platform,
    random_blob,
)
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import HTML, Fault, too_many_requests

_THREADS = ThreadPoolExecutor(16)

IMAGES = {
    "OCI index": multi_platform(),
    "OCI image": image(),
    "Docker list": multi_platform(docker=True),
    "Docker image": image(docker=True),
    "artifact": artifact(content(b"{}", OCI_MANIFEST)),
    "unknown type": Image(content(b'{"hello": "world"}', "application/vnd.example.thing+json")),
}


def repository(upstream: FakeUpstream, name: str = "team/app") -> Repository:
    return Repository.parse(upstream.registry, name)


def reference(upstream: FakeUpstream, text: str = "team/app:v1") -> Reference:
    return Reference.parse(f"{upstream.registry}/{text}")


def digest(of: Content) -> Digest:
    return Digest.parse(of.digest)


def read_all(stream: BlobStream, limit: int = 64 * 1024) -> bytes:
    data = bytearray()
    try:
        while piece := stream.read(limit):
            assert len(piece) <= limit
            data += piece
    finally:
        stream.close()
    return bytes(data)


def new_download(repository: Repository, digest: Digest, store: Store) -> Download:
    """One that gives up at the first broken connection."""
    return Download(
        repository,
        digest,
        store,
        Fetch(retries=1, blob_limit=1 << 30),
        partition="",
        expected_size=None,
        believes=True,
        spawn=_THREADS.submit,
    )


def run(download: Download, backend: Backend) -> bytes:
    """What is in the store then."""
    try:
        download.run(backend.fetch_blob)
        with os.fdopen(download.duplicate_file(), "rb") as file:
            return file.read()
    finally:
        download.close()


def fetch_blob(backend: Backend, repository: Repository, digest: Digest, store: Store) -> bytes:
    return run(new_download(repository, digest, store), backend)


def hold(
    upstream: FakeUpstream, backend: Backend, blob: Content, name: str = "team/app"
) -> Content:
    """A blob as registries have them: of an image, whose manifest was asked for before."""
    upstream.add(name, image_of([Layer(blob, blob.digest)]), tag="blob")
    backend.fetch_manifest(reference(upstream, f"{name}:blob"))
    return blob


class BackendContract(ABC):
    names: ClassVar[tuple[str, ...]] = (
        "a",
        "Team/App.js",
        "a/b/c/d.e/f__g/h-i",
        "v2/manifests/blobs",
    )
    """Repositories that the backend can ask for."""

    @abstractmethod
    def open_backend(self, upstream: FakeUpstream) -> Backend:
        """A backend for this upstream, with short time-outs; the fixture closes it."""

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.store = Store(tmp_path / "store")

    @pytest.fixture
    def backend(self, upstream: FakeUpstream) -> object:
        opened = self.open_backend(upstream)
        yield opened
        opened.close()

    # Manifests

    @pytest.mark.parametrize("kind", IMAGES)
    def test_manifest_is_byte_for_byte_the_upstreams(
        self, upstream: FakeUpstream, backend: Backend, kind: str
    ) -> None:
        top = upstream.add("team/app", IMAGES[kind], tag="v1").top
        for text in ("team/app:v1", f"team/app@{top.digest}", f"team/app:v1@{top.digest}"):
            holder = backend.fetch_manifest(reference(upstream, text))
            assert holder.raw == top.data
            assert holder.descriptor.digest == digest(top)
            assert holder.descriptor.size == top.size
            assert holder.descriptor.media_type == top.media_type

    def test_resolve_names_the_same_digest(self, upstream: FakeUpstream, backend: Backend) -> None:
        top = upstream.add("team/app", multi_platform(), tag="v1").top
        descriptor = backend.resolve(reference(upstream))
        assert descriptor.digest == digest(top)
        assert descriptor.media_type == top.media_type

    def test_names_keep_their_case_dots_and_depth(
        self, upstream: FakeUpstream, backend: Backend
    ) -> None:
        for name in self.names:
            top = upstream.add(name, image(name.replace("/", "-")), tag="V1.0-RC_1").top
            holder = backend.fetch_manifest(reference(upstream, f"{name}:V1.0-RC_1"))
            assert holder.descriptor.digest == digest(top)

    def test_manifest_of_almost_4_mib(self, upstream: FakeUpstream, backend: Backend) -> None:
        top = upstream.add("team/app", image(pad_to=MANIFEST_MAX_SIZE - 1000), tag="v1").top
        assert backend.fetch_manifest(reference(upstream)).raw == top.data

    def test_larger_manifest_is_refused(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.add("team/app", image(pad_to=MANIFEST_MAX_SIZE + 1), tag="v1")
        for fault in (Fault(), Fault(chunked=True)):
            upstream.fault("/manifests/", fault)
            with pytest.raises(ManifestInvalid, match="too large"):
                backend.fetch_manifest(reference(upstream))

    def test_unknown_manifest(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.add("team/app", image(), tag="v1")
        absent = content(b"nothing")
        for text in ("team/app:v2", "team/other:v1", f"team/app@{absent.digest}"):
            with pytest.raises((ManifestUnknown, NameUnknown)):
                backend.fetch_manifest(reference(upstream, text))
            with pytest.raises((ManifestUnknown, NameUnknown)):
                backend.resolve(reference(upstream, text))

    def test_wrong_bytes_for_a_digest(self, upstream: FakeUpstream, backend: Backend) -> None:
        wanted, other = image("wanted").top, image("other").top
        upstream.add_content("team/app", wanted)
        upstream.fault("/manifests/", Fault(body=other.data))
        with pytest.raises(DigestMismatch):
            backend.fetch_manifest(reference(upstream, f"team/app@{wanted.digest}"))

    def test_tag_and_digest_have_to_agree(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.add("team/app", image("now"), tag="v1")
        before = upstream.add("team/app", image("before")).top
        with pytest.raises(DigestMismatch):
            backend.fetch_manifest(reference(upstream, f"team/app:v1@{before.digest}"))

    def test_html_page_is_no_manifest(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.add("team/app", image(), tag="v1")
        upstream.fault("/manifests/", HTML)
        with pytest.raises(ManifestInvalid):
            backend.fetch_manifest(reference(upstream))

    def test_document_that_is_not_what_its_type_says(
        self, upstream: FakeUpstream, backend: Backend
    ) -> None:
        bad = content(b'{"schemaVersion": 2, "layers": "none"}', OCI_MANIFEST)
        upstream.add("team/app", Image(bad), tag="v1")
        with pytest.raises(ManifestInvalid):
            backend.fetch_manifest(reference(upstream))
        upstream.add("team/app", image(), tag="v1")
        upstream.fault("/manifests/", Fault(content_type=DOCKER_MANIFEST))
        with pytest.raises(ManifestInvalid):
            backend.fetch_manifest(reference(upstream))

    # Blobs

    def test_blob(self, upstream: FakeUpstream, backend: Backend) -> None:
        blob = hold(upstream, backend, random_blob(300_000))
        where = (repository(upstream), digest(blob))
        assert backend.stat_blob(*where) == blob.size
        download = new_download(*where, self.store)
        assert run(download, backend) == blob.data
        assert (download.state, download.size) == (State.VERIFIED, blob.size)
        assert download.bytes_fetched == blob.size

    def test_config_comes_without_the_blobs_beside_it(
        self, upstream: FakeUpstream, backend: Backend
    ) -> None:
        made = upstream.add("team/app", image(layer_size=100_000), tag="v1")
        manifest = made.top.json()
        (config,) = (each for each in made.blobs if each.digest == manifest["config"]["digest"])
        where = Reference(repository(upstream), digest=digest(made.top))
        described = Descriptor(config.media_type, digest(config), config.size)
        assert backend.fetch_config(where, described) == config.data
        assert upstream.bytes_sent("/blobs/") == config.size
        with pytest.raises(SizeMismatch):
            backend.fetch_config(where, described._replace(size=config.size + 1))

    def test_empty_blob(self, upstream: FakeUpstream, backend: Backend) -> None:
        blob = hold(upstream, backend, content(b"", OCI_LAYER))
        where = (repository(upstream), digest(blob))
        assert backend.stat_blob(*where) == 0
        assert fetch_blob(backend, *where, self.store) == b""

    def test_unknown_blob(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.add("team/app", image())
        absent = digest(content(b"nothing"))
        with pytest.raises(BlobUnknown):
            backend.stat_blob(repository(upstream), absent)
        with pytest.raises(BlobUnknown):
            fetch_blob(backend, repository(upstream), absent, self.store)

    @pytest.mark.parametrize("cut", [0, 1, 100_000, 299_999])
    def test_cut_blob(self, upstream: FakeUpstream, backend: Backend, cut: int) -> None:
        blob = hold(upstream, backend, random_blob(300_000))
        upstream.fault("/blobs/", Fault(cut_after=cut))
        with pytest.raises(UpstreamUnavailable):
            fetch_blob(backend, repository(upstream), digest(blob), self.store)
        assert self.store.blobs.find_size(digest(blob)) is None

    def test_wrong_bytes_of_a_blob(self, upstream: FakeUpstream, backend: Backend) -> None:
        blob = hold(upstream, backend, random_blob(300_000))
        upstream.fault("/blobs/", Fault(flip_at=200_000))
        with pytest.raises(DigestMismatch):
            fetch_blob(backend, repository(upstream), digest(blob), self.store)
        assert self.store.blobs.find_size(digest(blob)) is None

    def test_abort_ends_a_download(self, upstream: FakeUpstream, backend: Backend) -> None:
        blob = hold(upstream, backend, random_blob(300_000))
        upstream.fault("/blobs/", Fault(stall_after=100_000))
        download = new_download(repository(upstream), digest(blob), self.store)
        timer = threading.Timer(0.2, download.abort)
        timer.start()
        with pytest.raises(UpstreamUnavailable):
            run(download, backend)
        timer.join()
        download.abort()
        with pytest.raises(UpstreamUnavailable):
            run(download, backend)

    # Listings

    def test_tags_in_pages(self, upstream: FakeUpstream, backend: Backend) -> None:
        for tag in ("a", "b", "c"):
            upstream.add("team/app", image(), tag=tag)
        first = backend.fetch_listing(repository(upstream), "tags/list", "n=2")
        assert first.raw == b'{"name": "team/app", "tags": ["a", "b"]}'
        assert first.media_type == "application/json"
        assert first.next_query == "n=2&last=b"
        last = backend.fetch_listing(repository(upstream), "tags/list", first.next_query)
        assert last.raw == b'{"name": "team/app", "tags": ["c"]}'
        assert last.next_query == ""

    def test_listing_of_an_unknown_repository(
        self, upstream: FakeUpstream, backend: Backend
    ) -> None:
        with pytest.raises(NameUnknown):
            backend.fetch_listing(repository(upstream), "tags/list", "")

    def test_referrers(self, upstream: FakeUpstream, backend: Backend) -> None:
        top = upstream.add("team/app", image(), tag="v1").top
        found = upstream.add("team/app", artifact(top)).top
        path = f"referrers/{top.digest}"
        query = "artifactType=application/vnd.example.sbom.v1"
        listing = backend.fetch_listing(repository(upstream), path, query)
        assert found.digest.encode() in listing.raw
        assert listing.filters_applied == "artifactType"

    # Failures

    @pytest.mark.parametrize("status", [500, 502, 503, 504])
    def test_server_errors(self, upstream: FakeUpstream, backend: Backend, status: int) -> None:
        upstream.fault("/", Fault(status=status))
        with pytest.raises(UpstreamUnavailable) as caught:
            backend.fetch_manifest(reference(upstream))
        assert (caught.value.timed_out, caught.value.unreachable) == (False, False)

    def test_rate_limit(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.fault("/manifests/", too_many_requests("7"))
        with pytest.raises(UpstreamRateLimited) as caught:
            backend.fetch_manifest(reference(upstream))
        assert caught.value.retry_after == 7

    def test_upstream_that_is_down(self, upstream: FakeUpstream, backend: Backend) -> None:
        upstream.stop_listening()
        with pytest.raises(UpstreamUnavailable) as caught:
            backend.fetch_manifest(reference(upstream))
        assert caught.value.unreachable
        assert caught.value.upstream == upstream.registry

    # Authentication and threads

    @pytest.fixture
    def protected(self, make_upstream: Callable[..., FakeUpstream]) -> FakeUpstream:
        """Every repository wants a token of its own."""
        return make_upstream(auth=TokenAuth())

    def test_second_repository_behind_a_token(self, protected: FakeUpstream) -> None:
        upstream, backend = protected, self.open_backend(protected)
        for name in ("team/one", "team/two"):
            upstream.add(name, image(), tag="v1")
        for _ in range(2):
            for name in ("team/one", "team/two"):
                holder = backend.fetch_manifest(reference(upstream, f"{name}:v1"))
                assert holder.descriptor.digest == digest(image().top)
        backend.close()

    def test_many_threads(self, protected: FakeUpstream) -> None:
        upstream, backend = protected, self.open_backend(protected)
        names = [f"team/app-{n}" for n in range(4)]
        blobs = {name: random_blob(200_000, seed=name) for name in names}
        for name in names:
            upstream.add(name, image(name.replace("/", "-")), tag="v1")
            hold(upstream, backend, blobs[name], name)

        def pull(name: str) -> bool:
            holder = backend.fetch_manifest(reference(upstream, f"{name}:v1"))
            blob = blobs[name]
            data = fetch_blob(backend, repository(upstream, name), digest(blob), self.store)
            expected = image(name.replace("/", "-")).digest
            return data == blob.data and str(holder.descriptor.digest) == expected

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(pull, names * 8))
        backend.close()
