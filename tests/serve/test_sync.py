"""`sync`: chosen images are up to date and whole without a client that asks for them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ociproxy import log
from ociproxy.cli.backends import backends
from ociproxy.cli.load_run import LoadRun
from ociproxy.cli.main import main
from ociproxy.cli.screen import Screen
from ociproxy.cli.sync_command import _wanted
from ociproxy.config.file import parse_config
from ociproxy.config.schedule import Sync, Window
from ociproxy.config.settings import Config
from ociproxy.load.sync import SyncRun, last_run
from ociproxy.oci.digest import Digest
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference
from ociproxy.serve.syncing import SyncJob
from ociproxy.store.image import read_contents
from ociproxy.store.store import Store
from tests.clock import HandClock
from tests.images import Image, image, multi_platform
from tests.server import Mirror, upstream_entry
from tests.stores import put, record_tag, stored
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault, too_many_requests

LONG_AGO = 1_000_000.0
ALL = Sync(images=("*",))


def configured(*upstreams: FakeUpstream) -> Config:
    """Images come one by one."""
    entries = json.dumps([upstream_entry(each.url) for each in upstreams])
    text = f"upstreams: {entries}\nload: {{pull_timeout: 300ms, jobs: 1}}\n"
    return parse_config(text, "test")


class Syncing:
    """A store, and runs over it in this process. What a run logs is kept."""

    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self.store = Store(folder / "store")
        self.upstream = upstream
        self.folder = folder
        self.config = configured(upstream)
        self.clock = HandClock(time.time())

    def name(self, repository: str) -> str:
        return f"{self.upstream.registry}/team/{repository}:v1"

    def put(self, repository: str, made: Image, *, resolved: float = LONG_AGO) -> Image:
        put(self.store, self.name(repository), made, resolved=resolved)
        return self.upstream.add(f"team/{repository}", made, tag="v1")

    def run(self, sync: Sync = ALL) -> dict[str, Any]:
        """What the run wrote down."""
        running = SyncRun(self.store, self.config, sync, clock=self.clock)
        run = LoadRun(
            self.config,
            backends(self.store, self.config),
            Screen(),
            running,
            referrers=sync.referrers,
            admits=running.admits,
        )
        wanted = running.ordered(_wanted(self.store, sync))
        asyncio.run(run.run(self.store, wanted, only_find=False))
        running.end(run.summary)
        path = self.store.root / "sync" / f"{sync.key}.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def asked(self) -> list[str]:
        """The repositories whose tag the upstream was asked for, in order."""
        heads = self.upstream.seen("/manifests/v1")
        return [each.path.split("/")[3] for each in heads]

    def tag(self, repository: str) -> str:
        reference = Reference.parse(self.name(repository))
        record = self.store.refs.find_tag(reference.repository, "v1")
        assert record is not None
        return str(record.descriptor.digest)

    def is_whole(self, repository: str) -> bool:
        reference = Reference.parse(self.name(repository))
        top = self.store.refs.find(reference)
        assert top is not None
        return read_contents(self.store, reference.repository, top).complete


@pytest.fixture
def syncing(tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> Syncing:
    monkeypatch.setattr(log, "_threshold", logging.INFO)
    return Syncing(tmp_path, upstream)


def numbers(record: dict[str, Any]) -> dict[str, int]:
    names = ("images", "current", "moved", "completed", "failed", "postponed")
    return {name: record[name] for name in names if record[name]}


def test_tags_are_asked_for_and_images_completed(
    syncing: Syncing, capfd: pytest.CaptureFixture[str]
) -> None:
    same = syncing.put("same", image("same"))
    syncing.put("moved", image("old"))
    new = syncing.upstream.add("team/moved", image("new"), tag="v1")
    broken = syncing.put("broken", image("broken"))
    stored(syncing.store, broken.layers[0]).unlink()
    record = syncing.run()
    assert numbers(record) == {"images": 3, "current": 1, "moved": 1, "completed": 1}
    assert (syncing.tag("same"), syncing.tag("moved")) == (same.digest, new.digest)
    assert all(syncing.is_whole(name) for name in ("same", "moved", "broken"))
    # What has not moved cost the upstream a HEAD only.
    assert [each.method for each in syncing.upstream.seen("team/same/")] == ["HEAD"]
    said = capfd.readouterr().err
    assert re.search(rf"tag moved reference={syncing.name('moved')} digest={new.digest}", said)
    assert f"image completed reference={syncing.name('broken')} " in said
    assert re.search(r"sync ended sync=\* images=3 current=1 moved=1 completed=1 .* next=2", said)


def test_patterns_mean_the_platforms_that_are_stored_and_no_tag_that_is_only_named(
    syncing: Syncing,
) -> None:
    old = syncing.put("app", multi_platform("old"))
    for lost in (old.manifests[0], old.manifests[2]):
        stored(syncing.store, lost).unlink()
    new = syncing.upstream.add("team/app", multi_platform("new"), tag="v1")
    syncing.put("other", image("other"))
    named = syncing.upstream.add("team/named", image("named"), tag="v1")
    holder = Reference.parse(syncing.name("named"))
    top = syncing.store.refs.find(Reference.parse(syncing.name("app")))
    assert top is not None
    descriptor = top._replace(digest=Digest.parse(named.digest), size=named.top.size)
    record_tag(syncing.store, holder.repository, "v1", descriptor, now=0.0)
    syncing.run(Sync(images=("*/team/app:*", "*/team/named:*")))
    assert syncing.asked() == ["app"]
    asked = {each.path.rpartition("/")[2] for each in syncing.upstream.seen("/manifests/sha256")}
    assert asked == {new.digest, new.manifests[1].digest}


def test_a_list_of_images_is_loaded_for_the_platforms_of_the_entry(syncing: Syncing) -> None:
    syncing.upstream.add("team/app", multi_platform("app"), tag="v1")
    names = syncing.folder / "images.txt"
    names.write_text(f"{syncing.name('app')}\n")
    sync = Sync(images=names, platforms=(Platform.parse("linux/arm/v7"),))
    assert numbers(syncing.run(sync)) == {"images": 1, "completed": 1}
    reference = Reference.parse(syncing.name("app"))
    top = syncing.store.refs.find(reference)
    assert top is not None
    found = read_contents(syncing.store, reference.repository, top)
    assert list(map(str, found.platforms)) == ["linux/arm/v7"]


def test_once_the_window_has_closed_no_image_is_begun_and_the_oldest_came_first(
    syncing: Syncing,
) -> None:
    for age, name in enumerate(["b", "z-oldest", "a"]):
        made = image(name)
        syncing.put(name, made, resolved=LONG_AGO + (age - 1) % 3)
    syncing.clock.time = time.mktime((2026, 6, 10, 4, 59, 0, 0, 0, -1))
    night = Sync(images=("*",), window=Window.parse("01:00-05:00"))

    class Closing(HandClock):
        """Each image takes half a minute."""

        def now(self) -> float:
            self.time += 25.0
            return self.time

    syncing.clock = Closing(syncing.clock.time)
    record = syncing.run(night)
    assert record["window_closed"] is True
    assert syncing.asked() == ["z-oldest"]
    assert numbers(record) == {"images": 3, "current": 1, "postponed": 2}


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault(headers={"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "9"}), "9 pulls"),
        (too_many_requests("600"), "429"),
        (None, "connection refused"),
    ],
)
def test_an_upstream_without_quota_or_that_is_away_waits_for_the_next_run(
    syncing: Syncing, make_upstream: Callable[..., FakeUpstream], fault: Fault | None, why: str
) -> None:
    for name in "abcd":
        syncing.put(name, image(name))
    other = make_upstream()
    made = other.add("team/app", image("app"), tag="v1")
    put(syncing.store, f"{other.registry}/team/app:v1", made, resolved=LONG_AGO + 1)
    syncing.config = configured(syncing.upstream, other)
    if fault is None:
        syncing.upstream.stop_listening()
    else:
        syncing.upstream.fault("/manifests/", fault)
    record = syncing.run()
    assert set(syncing.asked()) <= {"a"}
    assert record["postponed"] == 3
    ((registry, reason),) = record["upstreams_postponed"].items()
    assert (registry, why in reason) == (syncing.upstream.registry, True)
    # The other one was asked.
    assert other.count("/manifests/v1", "HEAD") == 1
    assert all(syncing.is_whole(name) for name in "abcd")


def test_what_fails_is_said_and_kept(syncing: Syncing, capfd: pytest.CaptureFixture[str]) -> None:
    syncing.put("gone", image("gone"))
    syncing.upstream.remove_tag("team/gone", "v1")
    syncing.put("here", image("here"))
    record = syncing.run()
    assert numbers(record) == {"images": 2, "current": 1, "failed": 1}
    assert syncing.is_whole("gone")
    said = capfd.readouterr().err
    assert f"image not synced reference={syncing.name('gone')} kept=yes reason=" in said


def test_an_entry_is_due_when_its_time_has_come(syncing: Syncing) -> None:
    sync = Sync(images=("*",), every=3600.0)
    other = Sync(images=("none/*",), every=7200.0)
    config = replace(syncing.config, sync=(sync, other))
    job = SyncJob(syncing.store, config, clock=syncing.clock)

    def due() -> str | None:
        words = job.due()
        return None if words is None else words[1]

    assert due() == sync.key
    syncing.run(sync)
    assert last_run(syncing.store, sync) == pytest.approx(syncing.clock.time, abs=1.0)
    # A run that ended with an error has not the turn of the others.
    assert due() == other.key
    job.ended(2)
    assert due() is None
    syncing.clock.time += 601.0
    assert due() == other.key
    job.use(replace(config, sync=(sync,)))
    assert due() is None
    syncing.clock.time += 3000.0
    assert due() == sync.key
    job.use(replace(config, serve=replace(config.serve, offline=True)))
    assert due() is None


def test_one_worker_of_a_server_syncs_and_a_reload_brings_more(
    tmp_path: Path, upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    store = Store(tmp_path / "store")
    name = f"{upstream.registry}/team"
    put(store, f"{name}/app:v1", image("old"))
    new = upstream.add("team/app", image("new"), tag="v1")
    closed = time.localtime(time.time() + 7200)
    never = f"{closed.tm_hour:02}:00-{(closed.tm_hour + 1) % 24:02}:00"
    entries: list[dict[str, object]] = [
        {"images": ["*/team/app:*"]},
        {"images": ["*:v1"], "window": never},
    ]
    config = {"upstreams": [upstream_entry(upstream.url)], "sync": entries}
    server = mirror(config, args=["--workers", "2"], store=store.root)
    server.wait_for_log("sync ended", 30.0)
    assert upstream.count("/manifests/v1", "HEAD") == 1
    assert server.manifest(upstream.registry, "team/app", "v1").digest == new.digest
    assert f"tag moved reference={name}/app:v1" in server.log()

    more = tmp_path / "more.txt"
    more.write_text(f"{name}/more:v1\n")
    upstream.add("team/more", image("more"), tag="v1")
    server.write_config({**config, "sync": [*entries, {"images": str(more)}]})
    server.reload()
    server.wait_for_log(f"sync ended sync={more}", 30.0)
    assert server.log().count("sync began") == 2
    assert f"image completed reference={name}/more:v1" in server.log()
    # The server ends while a run waits for its upstream.
    upstream.fault("/manifests/", Fault(delay=60.0))
    server.write_config({**config, "sync": [{"images": ["*"]}]})
    server.reload()
    server.wait_for(lambda: server.log().count("sync began") == 3, "begun", 30.0)
    server.stop()
    upstream.release()


def test_an_entry_that_the_file_has_no_more_counts_as_failed_and_is_not_begun_again_at_once(
    tmp_path: Path,
) -> None:
    Store(tmp_path / "store")
    words = ["sync", "0123456789abcdef", "--json", "--image-path", str(tmp_path / "store")]
    assert CliRunner().invoke(main, words).exit_code == 3
