"""`load`, `import` and skopeo where the store has a limit: room is made, or they refuse."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ociproxy.config.local_settings import Store as Settings
from ociproxy.config.settings import Fetch
from ociproxy.errors import NoRoom
from ociproxy.fetch.skopeo.backend import SkopeoBackend
from ociproxy.store.room import Room
from ociproxy.store.store import Store
from ociproxy.store.usage import Usage
from tests import layouts
from tests.archive.importing import Import
from tests.fetch.conftest import entry
from tests.fetch.contract import digest, new_download, reference, repository, run
from tests.images import Image, image
from tests.load.loading import Load
from tests.parts.tools import require_tool
from tests.pruning import put_aged
from tests.upstream import FakeUpstream

KIB = 1024
CAP = 1024 * KIB
LAYER = 200 * KIB
SMALL = 10 * KIB
"""Manifests ask for no room."""


def size_of(store: Path) -> int:
    folders = [store / name for name in ("blobs", "img", "fat")]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def config(upstream: FakeUpstream, load: Load, **store: object) -> None:
    load.write_config(upstream.url, store={"max_size": CAP, "min_free": 0, **store})


def test_a_load_makes_room_and_names_what_has_none(upstream: FakeUpstream, load: Load) -> None:
    """Not by removing what it shall load, too: that is not fetched again, and pinned."""
    config(upstream, load)
    store = Store(load.store)
    for number in range(4):
        old = image(f"old{number}", layers=1, layer_size=LAYER)
        put_aged(store, f"{upstream.registry}/old{number}:v1", old, 10 - number)
    old0 = upstream.add("old0", image("old0", layers=1, layer_size=LAYER), tag="v1")
    sizes = {"new0": LAYER, "big": 6 * LAYER, "new1": LAYER, "new2": LAYER}
    made = {
        name: upstream.add(name, image(name, layers=1, layer_size=size), tag="v1")
        for name, size in sizes.items()
    }
    names = {name: f"{upstream.registry}/{name}:v1" for name in [*sizes, "old0"]}
    done = load.run(load.write(*names.values()), "--pin", "--json", "--jobs", "2")
    assert done.code == 4, done.stderr
    [failed] = done.events("failed")
    assert failed["reference"] == names["big"]
    assert "are too many for store.max_size (1MiB)" in failed["reason"]
    assert {each["reference"] for each in done.events("loaded")} == {*names.values()} - {
        names["big"]
    }
    assert upstream.count(old0.layers[0].digest, "GET") == 0
    assert upstream.count(made["big"].layers[0].digest, "GET") == 0
    assert size_of(load.store) <= CAP + SMALL
    assert f"{upstream.registry}/old1:v1" not in load.complete()
    assert load.complete() >= {*names.values()} - {names["big"]}

    # All is pinned now, and one more fits.
    more = [
        upstream.add(name, image(name, layers=1, layer_size=LAYER // 2), tag="v1")
        for name in ("more0", "more1")
    ]
    listed = load.write(*(f"{upstream.registry}/more{number}:v1" for number in range(2)))
    planned = load.run(listed, "--plan")
    assert planned.code == 4
    assert "store.max_size (1MiB) leaves room for 1" in planned.stdout
    assert "may be: NOT ENOUGH" in planned.stdout
    done = load.run(listed, "--json", "--jobs", "1")
    assert done.code == 4
    assert [each["reference"] for each in done.events("loaded")] == [
        f"{upstream.registry}/more0:v1"
    ]
    [failed] = done.events("failed")
    assert "leaves no room for" in failed["reason"]
    assert upstream.count(more[1].layers[0].digest, "GET") == 0
    assert size_of(load.store) <= CAP + SMALL


def test_a_config_that_says_the_platform_asks_for_room(upstream: FakeUpstream, load: Load) -> None:
    """It is fetched before all else, where the tag leads to no index."""
    load.write_config(upstream.url, store={"max_size": 10_000, "min_free": 0})
    upstream.add("app", image("app", command=["x" * 20_000]), tag="v1")
    done = load.run(load.write(f"{upstream.registry}/app:v1 platform=linux/amd64"))
    assert done.code == 4, done.stderr
    assert size_of(load.store) == 0


def archive(folder: Path) -> tuple[Path, dict[str, Image]]:
    made = {
        f"quay.io/{name}:v1": image(name, layers=1, layer_size=size)
        for name, size in (("app", LAYER), ("big", 6 * LAYER))
    }
    return layouts.write_tar(folder / "images.tar", layouts.members(made)), made


@pytest.mark.parametrize("offline", [False, True], ids=["room is made", "offline"])
def test_an_import_names_what_has_no_room(tmp_path: Path, *, offline: bool) -> None:
    run = Import(tmp_path)
    store = Store(run.store)
    for number in range(3 if offline else 5):
        old = image(f"old{number}", layers=1, layer_size=LAYER)
        put_aged(store, f"quay.io/old{number}:v1", old, 10 - number)
    settings = tmp_path / "config.yaml"
    settings.write_text(
        f"store: {{max_size: {CAP}, min_free: 0}}\nserve: {{offline: {str(offline).lower()}}}\n"
    )
    path, made = archive(tmp_path)
    done = run.run("--config-path", str(settings), path)
    assert done.code == 4, done
    assert done.statuses == {"quay.io/app:v1": "imported", "quay.io/big:v1": "no room"}
    assert any("too many for store.max_size (1MiB)" in each for each in done.problems)
    run.check("quay.io/app:v1", made["quay.io/app:v1"])
    assert ("quay.io/old0:v1" in run.listed()) is offline
    assert size_of(run.store) <= CAP + SMALL
    usage = store.usage.read()
    assert usage is not None
    assert usage.reserved == 0


def test_what_skopeo_brings_has_to_fit(upstream: FakeUpstream, tmp_path: Path) -> None:
    require_tool("skopeo")
    store = Store(tmp_path / "store")
    made = upstream.add("team/app", image(layers=1, layer_size=LAYER), tag="v1")
    store.usage.record(CAP - LAYER // 2, Usage(), freed=0, stuck=False)
    store.room = Room(store.root, store.usage, Settings(max_size=CAP), must_keep=True, evicts=False)
    backend = SkopeoBackend(entry(upstream), Fetch(), store)
    try:
        backend.fetch_manifest(reference(upstream))
        layer = digest(made.layers[0])
        with pytest.raises(NoRoom):
            run(new_download(repository(upstream), layer, store), backend)
        assert store.blobs.find_size(layer) is None
        usage = store.usage.read() or Usage()
        store.usage.record(0, usage, freed=0, stuck=False)
        assert run(new_download(repository(upstream), layer, store), backend) == made.layers[0].data
    finally:
        backend.close()


def test_room_that_is_promised_is_not_promised_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.usage.record(0, Usage(), freed=0, stuck=False)
    room = Room(store.root, store.usage, Settings(max_size=CAP), must_keep=True, evicts=False)
    size, stopped = CAP * 6 // 10, threading.Event()
    with room.held(size, stopped), pytest.raises(NoRoom), room.held(size, stopped):
        pass
    with room.held(size, stopped) as has_room:
        assert has_room
