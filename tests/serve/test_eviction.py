"""A store that stays within its limits while clients pull, and a server that says what it did."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.config.local_settings import Serve
from ociproxy.config.local_settings import Store as Settings
from ociproxy.config.settings import Config
from ociproxy.serve import eviction
from ociproxy.serve.eviction import Eviction
from ociproxy.store.store import Store
from ociproxy.store.usage import Usage
from tests.images import MIB, Content, Image, image
from tests.parts.tools import small_disk
from tests.pruning import listed, put_aged
from tests.server import Mirror, upstream_entry
from tests.stores import promised_to_a_killed_process
from tests.upstream import FakeUpstream

KIB = 1024
CAP = 1024 * KIB
SMALL = 10 * KIB
"""Manifests do not wait for room."""
PATIENCE = 7.0
"""Seconds that a download waits for room at least: a bit less than it does."""


def size_of(store: Path) -> int:
    """Bytes of its content."""
    folders = [store / name for name in ("blobs", "img", "fat")]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


@pytest.fixture
def start(mirror: Callable[..., Mirror], upstream: FakeUpstream) -> Callable[..., Mirror]:
    def make(
        folder: Path | None = None, *, workers: int = 1, admin: bool = False, **store: object
    ) -> Mirror:
        entry = upstream_entry(upstream.url)
        serve = {"workers": workers}
        config = {"store": store, "upstreams": [entry], "serve": serve}
        return mirror(config, store=folder, admin=admin)

    return make


def add(upstream: FakeUpstream, name: str, size: int) -> Image:
    return upstream.add(name, image(name, layers=1, layer_size=size), tag="v1")


def pull(server: Mirror, upstream: FakeUpstream, name: str, made: Image) -> list[str]:
    """As a client does; returns how the blobs were answered."""
    assert server.manifest(upstream.registry, name, "v1").body == made.top.data
    found = []
    for blob in made.blobs:
        answer = server.blob(upstream.registry, name, blob.digest)
        assert answer.body == blob.data
        found.append(answer.cache_status)
    return found


def pull_until_kept(server: Mirror, upstream: FakeUpstream, name: str, made: Image) -> None:
    """A slow machine may take longer to make room than a download waits for it."""

    def are_stored() -> bool:
        return all((server.store / "blobs" / blob.encoded).exists() for blob in made.blobs)

    def is_kept() -> bool:
        pull(server, upstream, name, made)
        with contextlib.suppress(AssertionError):
            server.wait_for(are_stored, "stored")
        return are_stored()

    server.wait_for(is_kept, f"{name} kept", 60)


def wait_until_stored(server: Mirror, made: Image) -> None:
    for blob in made.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_capped_store_keeps_what_is_pinned_and_what_was_pulled_last(
    start: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    names = [f"app{number}" for number in range(10)]
    made = {name: add(upstream, name, 130 * KIB) for name in names}
    pins = [f"{upstream.registry}/app0:*", f"{upstream.registry}/absent:v1"]
    server = start(workers=2, admin=True, max_size=CAP, keep_recent="0s", pins=pins)
    for name in names:
        pull_until_kept(server, upstream, name, made[name])
        assert size_of(server.store) <= CAP + SMALL
    images = listed(server.store)
    assert images[f"{upstream.registry}/app0:v1"]
    assert images[f"{upstream.registry}/app9:v1"]
    assert f"{upstream.registry}/app1:v1" not in images
    assert server.get("/readyz").status == 200
    log = server.log()
    assert f"evicted image={upstream.registry}/app1:v1" in log
    assert "reason=store.max_size" in log
    assert f'incomplete images=1 first="{upstream.registry}/absent:v1 (not stored)"' in log
    assert log.count("pinned images incomplete") <= 2  # app0 may be arriving when first counted
    # What fits under the cap, but not beside what is pinned, has nothing removed in vain.
    huge, evicted = add(upstream, "huge", 900 * KIB), log.count("evicted image=")
    pull(server, upstream, "huge", huge)
    server.wait_for_log("kept=False")
    assert {name for name, complete in listed(server.store).items() if complete} == set(images)
    assert server.log().count("evicted image=") == evicted
    # The page says what went and why, also after a restart.
    server.restart()
    page = server.admin("/store").body.decode()
    row = rf">{upstream.registry}/app1:v1</a></td>.*<td[^>]*>store\.max_size</td>"
    assert re.search(row, page)
    # Of two workers one keeps house.
    assert log.count(f"evicted image={upstream.registry}/app1:v1") == 1


@pytest.mark.parametrize(
    "more", [{"max_size": 8 * MIB}, {"max_size": CAP, "keep_recent": "1s"}], ids=["size", "recent"]
)
def test_a_cap_that_may_not_be_kept_is_said_and_misses_pass_through(
    start: Callable[..., Mirror], upstream: FakeUpstream, more: dict[str, object]
) -> None:
    """Until an operator allows more, without a restart. What began before is not kept, either."""
    made = [add(upstream, f"app{number}", 600 * KIB) for number in range(4)]
    server = start(max_size=CAP, keep_recent="1h")
    pull(server, upstream, "app0", made[0])
    wait_until_stored(server, made[0])
    pull(server, upstream, "app1", made[1])
    server.wait_for_log("store limit exceeded")
    server.wait_for_log("kept=False")  # of the download, which sees the same a moment later
    assert re.search(
        r"WARN  filled .* kept=False .* reason=\"store.max_size \(\S+\) leaves no room",
        server.log(),
    )
    assert f"limit={CAP}" in server.log()
    assert "recent=2" in server.log()
    size = size_of(server.store)
    for _ in range(2):
        assert pull(server, upstream, "app2", made[2])[-1].endswith("detail=not-stored")
    assert size_of(server.store) < size + SMALL
    assert pull(server, upstream, "app0", made[0])[-1] == "ociproxy; hit"
    assert server.get("/readyz").status == 200
    assert server.log().count("store limit exceeded") == 1
    server.write_config({"store": more, "upstreams": [upstream_entry(upstream.url)]})
    server.reload()
    server.wait_for_log("configuration reloaded")
    usage = Store(server.store).usage
    server.wait_for(lambda: (usage.read() or Usage(stuck=1.0)).stuck == 0, "tried again")
    time.sleep(1.1)  # longer than `keep_recent`

    pull_until_kept(server, upstream, "app3", made[3])


def test_images_make_room_on_a_full_disk_before_a_blob_passes_through(
    start: Callable[..., Mirror], upstream: FakeUpstream, tmp_path: Path
) -> None:
    made = add(upstream, "new", 2 * MIB)
    with small_disk(tmp_path / "disk", "8m") as folder:
        store = Store(folder)
        for number in range(5):
            old = image(f"old{number}", layers=1, layer_size=MIB)
            put_aged(store, f"quay.io/old{number}:v1", old, 10 - number)
        store.usage.want(0)  # as a server that was started before the disk was full
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        server = start(folder)
        for blob in made.blobs:
            if passes_through(server, upstream, blob):
                assert not passes_through(server, upstream, blob)
        wait_until_stored(server, made)
        server.wait_for_log("eviction images=", limit=60)
        images = listed(folder)
        assert "quay.io/old0:v1" not in images
        assert images["quay.io/old4:v1"]
        assert "reason=store.min_free" in server.log()
        server.stop()


def passes_through(server: Mirror, upstream: FakeUpstream, blob: Content) -> bool:
    """Whether there was no room for the blob of `new`, in all the time that its client could wait.
    The eviction yields the processor: on a busy machine it comes later. Then this waits for it."""

    def runs() -> int:
        return server.log().count("eviction images=")

    before, began = runs(), time.monotonic()
    answer = server.blob(upstream.registry, "new", blob.digest)
    assert answer.body == blob.data
    if not answer.cache_status.endswith("detail=not-stored"):
        return False
    assert time.monotonic() - began > PATIENCE
    server.wait_for(lambda: runs() > before, "evicted", limit=60)
    return True


def test_an_offline_mirror_removes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put_aged(store, "quay.io/old:v1", image("old", layer_size=100 * KIB), 10)
    settings = Settings(max_size=1000)
    assert Eviction(store, Config(store=settings)).due() == ["prune", "--to-limits"]
    offline = Config(store=settings, serve=Serve(offline=True))
    assert Eviction(store, offline).due() is None


def test_room_that_was_promised_to_a_killed_process_is_given_to_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = Store(tmp_path / "store"), Settings(max_size=1000, min_free=0)
    job = Eviction(store, Config(store=settings))
    store.usage.record(400, Usage(), freed=0, stuck=False)
    promised_to_a_killed_process(store, 500)
    assert job.due() is None
    store.usage.want(200)
    assert job.due() is None
    monkeypatch.setattr(eviction, "_VOID", 0.0)
    assert job.due() == ["prune", "--to-limits"]
    before = store.usage.read()
    assert before is not None
    store.usage.record(400, before, freed=0, stuck=False)  # what that command does
    assert store.usage.reserve(200, 1000)


def test_a_command_that_knows_another_limit_than_its_server_is_not_run_again_at_once(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "store")
    job = Eviction(store, Config(store=Settings(max_size=1000, min_free=0)))
    store.usage.want(0)
    store.usage.record(2000, Usage(), freed=0, stuck=False)
    assert job.due() is not None
    # The file was changed, to a larger limit, and the server was not told to reload it.
    job.heard({"event": "done", "cause": None, "freed": 0, "size": 2000})
    job.ended(0)
    assert job.due() is None
    store.usage.record(2000, store.usage.read() or Usage(), freed=0, pinned=7)
    job.use(Config(store=Settings(max_size=4000, min_free=0)))
    assert job.due() is None
    assert (store.usage.read() or Usage()).pinned == 0  # other images may be pinned now


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("list", "no image here!\n", "pins.txt:1: "),
        ("lock", "{}", "pins.txt"),
    ],
)
def test_a_server_does_not_start_with_pins_that_it_cannot_read(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    (tmp_path / "pins.txt").write_text(text)
    (tmp_path / "config.yaml").write_text(f"store: {{pins: [{{{name}: pins.txt}}]}}\n")
    config, store = str(tmp_path / "config.yaml"), str(tmp_path / "store")
    done = CliRunner().invoke(main, ["serve", "--config-path", config, "--image-path", store])
    assert done.exit_code in (2, 5), done.output
    assert expected in done.output
    assert not (tmp_path / "store").exists()
