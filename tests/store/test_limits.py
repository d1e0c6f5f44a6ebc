"""`store.max_size` and `store.min_free`: what they mean, and what a download does at them."""

from __future__ import annotations

import fcntl
import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.config.local_settings import Share
from ociproxy.config.local_settings import Store as Settings
from ociproxy.errors import NoRoom, StoreFull
from ociproxy.oci.digest import Digest
from ociproxy.store.ingest import Ingest
from ociproxy.store.limits import Limits
from ociproxy.store.room import Room
from ociproxy.store.store import Store
from ociproxy.store.usage import WANTED, Usage
from tests.images import random_blob

GIB = 1024**3
SEEDS = itertools.count()


def arriving(store: Store, size: int) -> Ingest:
    """A blob that is there, and has to be kept."""
    blob = random_blob(size, seed=str(next(SEEDS)))
    ingest = store.staging.lead(Digest.parse(blob.digest))
    assert ingest is not None
    ingest.write(0, blob.data)
    ingest.arrived(0, size)
    ingest.set_size(size)
    return ingest


def limits(
    max_size: int | None = None, min_free: int = 0, free: int = 500, total: int = 1000
) -> Limits:
    return Limits(max_size, min_free, free, total)


@pytest.mark.parametrize(
    ("given", "stored", "wanted", "target"),
    [
        (limits(), 10**9, 10**9, None),
        (limits(max_size=1000), 980, 0, None),
        (limits(max_size=1000), 981, 0, 900),
        (limits(max_size=1000), 900, 200, 780),
        (limits(max_size=1000), 780, 200, None),  # after that run
        (limits(max_size=1000), 900, 5000, 0),
        (limits(min_free=500), 400, 0, None),
        (limits(min_free=520), 400, 0, 400 - 20 - 52),
        (limits(min_free=400), 400, 150, 400 - 50 - 40),
        (limits(max_size=1000, min_free=520), 999, 0, 900),
        (limits(min_free=520, free=0, total=0), 400, 0, None),  # a disk that tells no size
    ],
)
def test_the_size_to_which_a_store_is_reduced(
    given: Limits, stored: int, wanted: int, target: int | None
) -> None:
    assert given.target(stored, wanted) == target
    assert (given.cause(stored, wanted) is None) is (target is None)


def test_a_percentage_is_of_the_file_system_and_little_stays_free_without_a_setting(
    tmp_path: Path,
) -> None:
    found = Limits.of(Settings(max_size=Share(50)), tmp_path)
    assert found.max_size == found.total // 2
    assert found.min_free == min(found.total // 20, 2 * GIB)
    assert Limits.of(Settings(min_free=0), tmp_path).exist is False


def test_what_is_larger_than_may_ever_be_kept_removes_nothing() -> None:
    assert limits(max_size=1000, total=10**6).can_fit(900)
    assert not limits(max_size=1000, total=10**6).can_fit(901)
    assert not limits(min_free=100, total=1000).can_fit(901)
    assert limits(max_size=1000, total=10**6).can_fit(600, pinned=400)
    assert not limits(max_size=1000, total=10**6).can_fit(600, pinned=401)
    assert not limits(min_free=100, total=1000).can_fit(600, pinned=301)


@pytest.mark.parametrize("known", [True, False], ids=["known", "found by the run"])
def test_what_does_not_fit_beside_what_is_pinned_waits_for_no_run_that_cannot_help(
    tmp_path: Path, known: bool
) -> None:
    store = Store(tmp_path)
    store.usage.record(990, Usage(), freed=0, stuck=False, pinned=500 if known else None)
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0))
    ingest, refused = arriving(store, 600), []
    before = store.usage.read() or Usage()

    def keep() -> None:
        refused.append(room.keep(ingest, store.blobs.commit, 600, threading.Event()))

    waiting = threading.Thread(target=keep)
    waiting.start()
    if not known:
        while not (store.usage.read() or Usage()).wanted:
            waiting.join(0.01)
        before = replace(before, runs=before.runs + 1, pinned=500, stored=900)
        store.usage.record(900, store.usage.read() or Usage(), freed=90, stuck=False, pinned=500)
    waiting.join(4)  # a download waits 8 s for room
    assert "beside 500 B that are pinned" in str(refused)
    after = store.usage.read() or Usage()
    assert (after.wanted, after.runs, after.stored) == (0, before.runs, before.stored)
    assert after.asked == before.asked or not known  # no server was asked for room
    with pytest.raises(NoRoom, match="no room for 600 B beside 500 B that are pinned"):
        Room(store.root, store.usage, Settings(max_size=1000, min_free=0), must_keep=True).make(
            lambda: 600, threading.Event()
        )
    ingest.close()


def test_a_download_goes_on_once_the_store_was_reduced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(1000, Usage(), freed=0, stuck=False)
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0))

    arrived = [arriving(store, 100), arriving(store, 450), arriving(store, 100)]
    refused: list[str | None] = []

    def keep() -> None:
        refused.append(room.keep(arrived[0], store.blobs.commit, 100, threading.Event()))

    waiting = threading.Thread(target=keep)
    waiting.start()
    while (usage := store.usage.read()) is None or not usage.wanted:
        waiting.join(0.01)
    assert waiting.is_alive()
    assert usage.wanted == 100
    store.usage.record(500, usage, freed=500, stuck=False)
    waiting.join(10)
    assert not waiting.is_alive()
    assert refused == [None]
    usage = store.usage.read()
    assert usage is not None
    assert (usage.stored, usage.reserved) == (600, 0)
    room.check(400)
    store.usage.record(600, usage, freed=0, stuck=True)
    assert room.keep(arrived[1], store.blobs.commit, 450, threading.Event()) is not None
    assert not arrived[1].path.exists()
    assert room.keep(arrived[2], store.blobs.commit, 100, threading.Event()) is None
    for each in arrived:
        each.close()


def test_a_download_that_was_refused_though_it_fits_gets_its_room_without_a_run(
    tmp_path: Path,
) -> None:
    """Another process had the file just when it asked."""
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    ingest, refused = arriving(store, 100), []
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0))
    waiting = threading.Thread(
        target=lambda: refused.append(room.keep(ingest, store.blobs.commit, 100, threading.Event()))
    )
    with (tmp_path / "locks/usage").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join(5)
    assert refused == [None]
    ingest.close()


def test_a_full_disk_is_tried_again_after_each_run(tmp_path: Path) -> None:
    """One that had begun before the download asked makes too little room for it."""
    store, begun = Store(tmp_path), threading.Event()
    store.usage.record(1000, Usage(), freed=0, stuck=False)
    runs = 0

    def begin(size: int) -> None:
        if runs < 2:
            raise StoreFull(tmp_path, f"no space left on device for {size} bytes more")
        begun.set()

    room = Room(store.root, store.usage, Settings(min_free=1))
    waiting = threading.Thread(target=room.wait_for_disk, args=(begin, 100, threading.Event()))
    waiting.start()
    for _ in range(2):
        while not (usage := store.usage.read() or Usage()).wanted and waiting.is_alive():
            waiting.join(0.01)
        runs += 1
        store.usage.record(1000, usage, freed=0, stuck=False)
    waiting.join(10)
    assert begun.is_set()


@pytest.mark.parametrize("ends", ["the server stops", "nothing may go", "the disk has room"])
def test_what_a_download_no_longer_waits_for_is_not_wanted(tmp_path: Path, ends: str) -> None:
    store, stopped = Store(tmp_path), threading.Event()
    store.usage.record(990, Usage(), freed=0, stuck=False)
    assert store.usage.want(7) == 1  # of another download
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=1))
    ingest = arriving(store, 100)
    if ends == "the disk has room":
        refused = [StoreFull(tmp_path, "no space left on device")]

        def begin(_: int) -> None:
            if refused:
                raise refused.pop()

        waiting = threading.Thread(target=room.wait_for_disk, args=(begin, 100, stopped))
    else:
        waiting = threading.Thread(
            target=room.keep, args=(ingest, store.blobs.commit, 100, stopped)
        )
    waiting.start()
    while (usage := store.usage.read() or Usage()).wanted != 107:
        waiting.join(0.01)
    if ends == "the server stops":
        stopped.set()
    else:
        store.usage.record(990, usage, freed=0, stuck=ends == "nothing may go")
        store.usage.want(7)
    waiting.join(10)
    assert not waiting.is_alive()
    usage = store.usage.read() or Usage()
    assert usage.wanted == 7
    if ends == "the server stops":
        assert usage.stored == 990
        assert ingest.path.stat().st_size == 100  # for the next server


def test_what_a_killed_process_waited_for_is_not_wanted_for_long(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.want(100)
    path = tmp_path / "locks/usage"
    written = json.loads(path.read_bytes())
    assert (store.usage.read() or Usage()).wanted == written["wanted"] == 100
    written["asked"] -= WANTED + 1
    path.write_text(json.dumps(written))
    assert (store.usage.read() or Usage()).wanted == 0
    store.usage.want(7)
    assert (store.usage.read() or Usage()).wanted == 7


def test_a_download_waits_no_longer_than_its_server_lives(tmp_path: Path) -> None:
    store, stopped = Store(tmp_path), threading.Event()
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0))
    stopped.set()
    ingest = arriving(store, 100)
    # In a store that was never counted.
    assert room.keep(ingest, store.blobs.commit, 100, stopped) is None
    ingest.close()


def test_a_command_waits_once_for_what_gets_no_room_and_not_for_each_image(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(990, Usage(), freed=0, stuck=True)  # long ago, for all that it knows
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0), must_keep=True)
    refused: list[NoRoom] = []

    def make() -> None:
        try:
            room.make(lambda: 100, threading.Event())
        except NoRoom as exc:
            refused.append(exc)

    waiting = threading.Thread(target=make)
    waiting.start()
    while not (usage := store.usage.read() or Usage()).wanted:
        waiting.join(0.01)
    store.usage.record(990, usage, freed=0, stuck=True)
    waiting.join(10)
    assert "leaves no room for 100 B more" in str(refused[0])
    store.usage.retry()
    before = store.usage.read()
    make()
    assert len(refused) == 2
    assert store.usage.read() == before  # it was not asked for
    room.make(lambda: 10, threading.Event())


def test_a_command_that_waits_for_room_counts_no_blob_twice(tmp_path: Path) -> None:
    """A blob of another image that arrives meanwhile is of the store's size then."""
    store = Store(tmp_path)
    store.usage.record(850, Usage(), freed=0, stuck=False)
    room = Room(store.root, store.usage, Settings(max_size=1000, min_free=0), must_keep=True)
    coming = [100, 100]
    done = threading.Event()

    def make() -> None:
        room.make(lambda: sum(coming), threading.Event())
        done.set()

    waiting = threading.Thread(target=make)
    waiting.start()
    while not (store.usage.read() or Usage()).wanted:
        waiting.join(0.01)
    assert not done.is_set()
    coming.pop()
    store.usage.add(50)
    assert done.wait(10)
    waiting.join(10)


def test_a_download_is_refused_where_nothing_may_be_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(1001, Usage(), freed=0, stuck=True)
    settings = Settings(max_size=1000, min_free=0)
    with pytest.raises(StoreFull, match="nothing may be removed"):
        Room(store.root, store.usage, settings).check(0)
    Room(store.root, store.usage).check(0)  # what an operator loads
    Room(store.root, store.usage, Settings(max_size=2000, min_free=0)).check(0)
