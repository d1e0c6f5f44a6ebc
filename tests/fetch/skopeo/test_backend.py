"""The skopeo backend: the contract of all backends, and what is its own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from ociproxy.config.settings import Auth, Fetch, Secret, Tls
from ociproxy.errors import (
    BlobTooLarge,
    BlobUnknown,
    DigestMismatch,
    NameUnknown,
    OciProxyError,
    SizeMismatch,
    UpstreamDenied,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.backend import Backend
from ociproxy.fetch.skopeo.backend import SkopeoBackend
from ociproxy.metrics.counters import FILLS, share
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.store.store import Store
from tests.fetch.conftest import TIMEOUTS, entry
from tests.fetch.contract import BackendContract, digest, fetch_blob, hold, reference, repository
from tests.fetch.tls import Authority
from tests.images import artifact, image, image_of, layer, random_blob, random_bytes
from tests.parts.tools import require_tool
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import Fault, too_many_requests


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Store:
    require_tool("skopeo")
    return Store(tmp_path / "store")


class TestSkopeo(BackendContract):
    names: ClassVar[tuple[str, ...]] = ("a", "team/app.js", "a/b/c/d.e/f__g/h-i", "v2/manifests")

    @pytest.fixture(autouse=True)
    def _store(self, store: Store) -> None:
        self.store = store

    def open_backend(self, upstream: FakeUpstream) -> Backend:
        return SkopeoBackend(entry(upstream), Fetch(), self.store)

    def test_referrers(self, upstream: FakeUpstream, backend: Backend) -> None:
        """skopeo does not know them; the caller goes on to the fallback tag."""
        top = upstream.add("team/app", image(), tag="v1").top
        upstream.add("team/app", artifact(top))
        with pytest.raises(NameUnknown):
            backend.fetch_listing(repository(upstream), f"referrers/{top.digest}", "")
        assert upstream.requests == []


# Its own


@pytest.fixture
def open_skopeo(store: Store) -> Iterator[Callable[..., SkopeoBackend]]:
    """Opens skopeo backends, with the arguments of `entry`."""
    opened: list[SkopeoBackend] = []

    def make(
        upstream: FakeUpstream, *, blob_limit: int = 1 << 30, **changes: object
    ) -> SkopeoBackend:
        fetch = Fetch(blob_limit=blob_limit)
        opened.append(SkopeoBackend(entry(upstream, **changes), fetch, store))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


OpenSkopeo = Callable[..., SkopeoBackend]


def test_a_helper_is_run_once_and_again_when_its_answer_is_refused(
    make_upstream: Callable[..., FakeUpstream],
    open_skopeo: OpenSkopeo,
    make_helper: Callable[[str, str], None],
    tmp_path: Path,
    store: Store,
) -> None:
    """The secret is the number of the run, and the upstream has moved on to the second one."""
    runs = tmp_path / "runs"
    answer = f"""printf '{{"Username":"me","Secret":"%d"}}' "$(wc -l < {runs})\""""
    make_helper("fake", f"echo >> {runs}; {answer}")
    upstream = make_upstream(auth=BasicAuth("me", "2"))
    held = upstream.add("team/app", image(), tag="v1")
    backend = open_skopeo(upstream, auth=Auth(helper="fake", lifetime=100.0))
    for _ in range(3):
        assert backend.fetch_manifest(reference(upstream)).raw == held.top.data
    blob = held.blobs[0]
    assert fetch_blob(backend, repository(upstream), digest(blob), store) == blob.data
    assert runs.read_text().count("\n") == 2


def skopeos() -> dict[int, list[str]]:
    """Process id -> arguments of every running skopeo that this process started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if words[0] == "skopeo" and parent == os.getpid():
                found[int(path.name)] = words
    return found


def wait_until(true: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("docker", [False, True])
def test_image_is_stored_whole_with_its_digest(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo, docker: bool
) -> None:
    held = upstream.add("team/app", image(docker=docker, layers=3), tag="v1")
    backend = open_skopeo(upstream)
    backend.fetch_manifest(reference(upstream))
    assert fetch_blob(backend, repository(upstream), digest(held.layers[0]), store)
    wait_until(lambda: store.manifests.find(digest(held.top)) is not None)
    for blob in held.blobs:
        found = store.blobs.find(digest(blob))
        assert found is not None
        with found.file:
            assert found.file.read() == blob.data
            assert found.sealed
    assert upstream.count("/blobs/") == len(held.blobs)


def test_relative_paths_and_a_store_with_a_colon_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """skopeo runs in another folder, and takes what stands behind a colon for a tag."""
    monkeypatch.chdir(tmp_path)
    authority = Authority(tmp_path)
    cert, key = (Path(path.name) for path in authority.client())
    tls = Tls(ca=Path(authority.ca.name), cert=cert, key=key)
    store = Store(Path("cache:1"))
    with FakeUpstream(tls=authority.server(clients=authority)) as upstream:
        held = upstream.add("team/app", image(), tag="v1")
        backend = SkopeoBackend(entry(upstream, tls=tls), Fetch(), store)
        try:
            backend.fetch_manifest(reference(upstream))
            assert fetch_blob(backend, repository(upstream), digest(held.layers[0]), store)
        finally:
            backend.close()
    assert not Path("cache").exists()


def test_a_blob_that_skopeo_brings_is_counted_as_a_download_that_ended_well(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    """Else an alert compares the failures of skopeo with nothing."""
    counts = share(1)
    held = upstream.add("team/app", image(layers=1), tag="v1")
    backend = open_skopeo(upstream)
    backend.fetch_manifest(reference(upstream))
    assert fetch_blob(backend, repository(upstream), digest(held.layers[0]), store)
    assert counts.totals()[FILLS.name,] == [1]


def test_stored_layer_is_not_fetched(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    shared = layer({"shared": random_bytes(100_000)})
    first = upstream.add("team/one", image_of([shared]), tag="v1")
    second = upstream.add("team/two", image_of([shared, layer({"own": b"own"})]), tag="v1")
    backend = open_skopeo(upstream)
    for name, each in (("team/one", first), ("team/two", second)):
        backend.fetch_manifest(reference(upstream, f"{name}:v1"))
        for blob in each.blobs:
            fetch_blob(backend, repository(upstream, name), digest(blob), store)
    assert upstream.count(shared.content.digest) == 1


def test_image_with_a_blob_above_the_limit_is_not_copied(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    layers = [layer({"small": b"small"}), layer({"large": random_bytes(100_000)})]
    held = upstream.add("team/app", image_of(layers), tag="v1")
    largest = held.layers[1]
    backend = open_skopeo(upstream, blob_limit=largest.size - 1)
    backend.fetch_manifest(reference(upstream))
    with pytest.raises(BlobTooLarge, match=r"fetch\.blob_limit"):
        fetch_blob(backend, repository(upstream), digest(largest), store)
    assert upstream.count("/blobs/") == 0


def test_blobs_of_a_manifest_that_only_the_store_knows(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    """As after a restart."""
    held = upstream.add("team/app", image(), tag="v1")
    holder = ManifestHolder.of(held.top.data)
    store.commit_manifest(repository(upstream), holder)
    backend = open_skopeo(upstream)
    where = repository(upstream), digest(held.layers[0])
    assert backend.stat_blob(*where) == held.layers[0].size
    assert fetch_blob(backend, *where, store) == held.layers[0].data


def test_tag_that_was_looked_up_is_fetched_once(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    held = upstream.add("team/app", image(), tag="v1")
    backend = open_skopeo(upstream)
    found = backend.resolve(reference(upstream))
    by_digest = reference(upstream, f"team/app@{found.digest}")
    assert backend.fetch_manifest(by_digest).raw == held.top.data
    assert upstream.count("/manifests/") == 1


def test_two_processes_copy_an_image_once(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo, tmp_path: Path
) -> None:
    held = upstream.add("team/app", image(layers=3, layer_size=300_000), tag="v1")
    upstream.fault("/blobs/", Fault(rate=1_000_000))
    other = SkopeoBackend(entry(upstream), Fetch(), Store(store.root))
    backends = [open_skopeo(upstream), other]
    try:
        for each in backends:
            each.fetch_manifest(reference(upstream))
        with ThreadPoolExecutor(2) as pool:
            work = [
                pool.submit(fetch_blob, each, repository(upstream), digest(blob), store)
                for each, blob in zip(backends, held.layers[:2], strict=True)
            ]
            assert [each.result() for each in work] == [b.data for b in held.layers[:2]]
    finally:
        other.close()
    for blob in held.layers:
        assert upstream.count(blob.digest) == 1


OWNER = """
import sys
from pathlib import Path
from ociproxy.store.store import Store
owned = Store(Path(sys.argv[1])).staging.workspace(sys.argv[2])
print(owned is not None, flush=True)
sys.stdin.read()
"""


def test_an_image_that_a_stopped_process_copies_is_copied_again(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    held = upstream.add("team/app", image(), tag="v1")
    backend = open_skopeo(upstream, timeouts=replace(TIMEOUTS, stall=1.0))
    backend.fetch_manifest(reference(upstream))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(store.root), f"skopeo-{held.top.encoded}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"True\n"
        owner.send_signal(signal.SIGSTOP)
        for blob in held.blobs:
            assert fetch_blob(backend, repository(upstream), digest(blob), store) == blob.data
    finally:
        owner.kill()
        owner.communicate()


def test_a_stopped_skopeo_is_ended(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    """Also while what has arrived is as long as a layer, which then may be on its way to the disk.
    A caller that tries again gets another one."""
    layers = [layer({"a": random_bytes(100_000)}), layer({"b": random_bytes(900_000)})]
    held = upstream.add("team/app", image_of(layers), tag="v1")
    small, large = held.layers
    upstream.fault(large.digest, Fault(stall_after=small.size), times=1)
    backend = open_skopeo(upstream, timeouts=replace(TIMEOUTS, stall=1.0))
    backend.fetch_manifest(reference(upstream))
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(fetch_blob, backend, repository(upstream), digest(large), store)
        wait_until(lambda: upstream.bytes_sent(large.digest) >= small.size)
        for process in skopeos():
            os.kill(process, signal.SIGSTOP)
        with pytest.raises(UpstreamUnavailable, match="without data"):
            fetched.result(30)
    assert skopeos() == {}
    assert fetch_blob(backend, repository(upstream), digest(large), store) == large.data


def test_layers_that_a_dead_process_got_are_not_fetched_again(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    held = upstream.add("team/app", image(layers=2), tag="v1")
    got, broken = held.layers
    layout = store.staging.root / f"skopeo-{held.top.encoded}" / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)
    (layout / "blobs" / "sha256" / got.encoded).write_bytes(got.data)
    (layout / "oci-put-blob1").write_bytes(b"half")
    backend = open_skopeo(upstream)
    backend.fetch_manifest(reference(upstream))
    for blob in held.blobs:
        assert fetch_blob(backend, repository(upstream), digest(blob), store) == blob.data
    assert (upstream.count(got.digest), upstream.count(broken.digest)) == (0, 1)
    wait_until(lambda: not layout.parent.exists())


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=404), BlobUnknown),
        (Fault(status=403), UpstreamDenied),
        (Fault(flip_at=10), DigestMismatch),
        (Fault(status=500), UpstreamUnavailable),
    ],
)
def test_one_bad_layer(
    upstream: FakeUpstream,
    store: Store,
    open_skopeo: OpenSkopeo,
    fault: Fault,
    kind: type[OciProxyError],
) -> None:
    held = upstream.add("team/app", image(layers=2, layer_size=200_000), tag="v1")
    bad, good = held.layers
    upstream.fault(bad.digest, fault)
    backend = open_skopeo(upstream)
    backend.fetch_manifest(reference(upstream))
    with pytest.raises(kind):
        fetch_blob(backend, repository(upstream), digest(bad), store)
    if kind is not UpstreamDenied:
        # What is wrong with one blob is not said of another.
        with contextlib.suppress(UpstreamUnavailable):
            assert fetch_blob(backend, repository(upstream), digest(good), store) == good.data
    upstream.heal()
    assert fetch_blob(backend, repository(upstream), digest(bad), store) == bad.data


def test_silent_upstream(upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo) -> None:
    upstream.fault("", Fault(delay=20))
    backend = open_skopeo(upstream, timeouts=replace(TIMEOUTS, connect=0.2, headers=0.3))
    began = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match=r"timed out after 0\.5 s") as caught:
        backend.fetch_manifest(reference(upstream))
    assert caught.value.timed_out
    assert time.monotonic() - began < 5
    assert skopeos() == {}


def test_stalled_layer(upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo) -> None:
    blob = random_blob(3_000_000)
    backend = open_skopeo(upstream, timeouts=replace(TIMEOUTS, stall=0.5))
    hold(upstream, backend, blob)
    upstream.fault(blob.digest, Fault(stall_after=2_000_000))
    with pytest.raises(UpstreamUnavailable, match="without data") as caught:
        fetch_blob(backend, repository(upstream), digest(blob), store)
    assert (caught.value.timed_out, caught.value.unreachable) == (True, False)
    wait_until(lambda: skopeos() == {})


def test_throttled_layer(upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo) -> None:
    blob = random_blob(1000)
    backend = open_skopeo(upstream)
    hold(upstream, backend, blob)
    upstream.fault(blob.digest, too_many_requests("9"))
    with pytest.raises(UpstreamRateLimited) as caught:
        fetch_blob(backend, repository(upstream), digest(blob), store)
    assert caught.value.retry_after == 9


def test_close_ends_what_runs(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    blob = random_blob(1_000_000)
    backend = open_skopeo(upstream)
    hold(upstream, backend, blob)
    upstream.fault(blob.digest, Fault(stall_after=1000))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(fetch_blob, backend, repository(upstream), digest(blob), store)
        wait_until(lambda: skopeos() != {})
        backend.close()
        with pytest.raises(UpstreamUnavailable):
            reading.result(10)
    wait_until(lambda: skopeos() == {} and list(store.staging.root.iterdir()) == [])


def test_password_is_on_no_command_line_and_no_disk(
    make_upstream: Callable[..., FakeUpstream], store: Store, open_skopeo: OpenSkopeo
) -> None:
    password = "correct horse"
    upstream = make_upstream(auth=TokenAuth(credentials=BasicAuth("ann", password)))
    held = upstream.add("team/app", image(), tag="v1")
    encoded = base64.b64encode(f"ann:{password}".encode()).decode()
    upstream.fault("/manifests/", Fault(delay=1.5))
    backend = open_skopeo(upstream, auth=Auth(user="ann", password=Secret(password)))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(backend.fetch_manifest, reference(upstream))
        wait_until(lambda: upstream.count("/manifests/") == 1)
        ((pid, words),) = skopeos().items()
        (option,) = (word for word in words if "authfile" in word)
        authfile = Path(option.partition("=")[2].replace("self", str(pid)))
        assert encoded in authfile.read_text()
        assert authfile.stat().st_mode & 0o777 == 0o600
        assert authfile.readlink().name == "memfd:auth.json (deleted)"
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
        for text in (*words, environment):
            assert password not in text
            assert encoded not in text
        for path in store.root.rglob("*"):
            assert not path.is_file() or encoded.encode() not in path.read_bytes()
        assert asking.result(10).raw == held.top.data


def test_docker_config_with_an_entry_for_one_repository(
    make_upstream: Callable[..., FakeUpstream], open_skopeo: OpenSkopeo, tmp_path: Path
) -> None:
    upstream = make_upstream(auth=BasicAuth("ann", "right"))
    file = tmp_path / "config.json"
    entry = {"username": "ann", "password": "right"}
    file.write_text(json.dumps({"auths": {f"{upstream.registry}/team": entry}}))
    backend = open_skopeo(upstream, auth=Auth(docker_config=file))
    held = upstream.add("team/app", image(), tag="v1")
    assert backend.fetch_manifest(reference(upstream)).raw == held.top.data


def test_wrong_password(
    make_upstream: Callable[..., FakeUpstream], open_skopeo: OpenSkopeo
) -> None:
    for auth in (BasicAuth("ann", "right"), TokenAuth(credentials=BasicAuth("ann", "right"))):
        upstream = make_upstream(auth=auth)
        upstream.add("team/app", image(), tag="v1")
        for given in (None, Auth(user="ann", password=Secret("wrong"))):
            backend = open_skopeo(upstream, auth=given)
            asks: list[Callable[[], object]] = [
                partial(backend.fetch_manifest, reference(upstream)),
                partial(backend.fetch_listing, repository(upstream), "tags/list", ""),
            ]
            for ask in asks:
                with pytest.raises(UpstreamDenied) as caught:
                    ask()
                assert caught.value.status == 401
                assert "wrong" not in str(caught.value)


def test_settings_of_the_machine_do_not_reach_it(
    upstream: FakeUpstream, open_skopeo: OpenSkopeo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "registries.conf"
    settings.write_text(f'[[registry]]\nlocation = "{upstream.registry}"\nblocked = true\n')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(settings))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "no-such-file"))
    held = upstream.add("team/app", image(), tag="v1")
    assert open_skopeo(upstream).fetch_manifest(reference(upstream)).raw == held.top.data


def test_program_that_cannot_be_run(
    upstream: FakeUpstream, open_skopeo: OpenSkopeo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UpstreamUnavailable, match="skopeo cannot be run: no such file"):
        open_skopeo(upstream).fetch_manifest(reference(upstream))


def test_layer_that_does_not_end(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    blob = random_blob(1000)
    backend = open_skopeo(upstream)
    hold(upstream, backend, blob)
    upstream.fault(blob.digest, Fault(body=random_bytes(20_000_000), rate=2_000_000))
    with pytest.raises(SizeMismatch, match="expected size"):
        fetch_blob(backend, repository(upstream), digest(blob), store)
    wait_until(lambda: skopeos() == {})


def test_one_image_in_two_repositories(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    """That one refuses is not the other's answer."""
    names = ("team/closed", "team/open")
    (blob,) = {upstream.add(name, image(), tag="v1").layers[0] for name in names}
    upstream.fault("/v2/team/closed/blobs/", Fault(status=403, delay=0.5))
    backend = open_skopeo(upstream)
    for name in names:
        backend.fetch_manifest(reference(upstream, f"{name}:v1"))
    with ThreadPoolExecutor(2) as pool:
        closed, opened = (
            pool.submit(fetch_blob, backend, repository(upstream, name), digest(blob), store)
            for name in names
        )
        assert opened.result() == blob.data
        with contextlib.suppress(UpstreamDenied):
            # The other one may have come first.
            assert closed.result() == blob.data


def test_name_that_skopeo_refuses(
    upstream: FakeUpstream, store: Store, open_skopeo: OpenSkopeo
) -> None:
    upstream.add("Team/App", image(), tag="v1")
    backend = open_skopeo(upstream)
    for ask in (backend.resolve, backend.fetch_manifest):
        with pytest.raises(NameUnknown, match="capitals"):
            ask(reference(upstream, "Team/App:v1"))
    with pytest.raises(NameUnknown, match="accepts no such name"):
        backend.resolve(reference(upstream, f"{'a' * 250}:v1"))
