"""Pins: what no prune removes, named by an operator, a load, an import or a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ociproxy.store.store import Store
from ociproxy.store.usage import Usage
from tests.archive.importing import Import
from tests.images import image
from tests.load.loading import Load
from tests.pruning import Done, listed, prune, put_aged, run, sharing
from tests.stores import stored
from tests.upstream import FakeUpstream

ONE, TWO, THREE = sharing("one", "two", "three")
NAMES = ["docker.io/library/one:v1", "quay.io/team/two:v1", "quay.io/team/three:v1"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for name, made in zip(NAMES, (ONE, TWO, THREE), strict=True):
        put_aged(store, name, made, 60)
    return store


def configured(store: Store, *pins: object, **serve: object) -> str:
    path = store.root.parent / "config.yaml"
    path.write_text(yaml.safe_dump({"store": {"pins": list(pins)}, "serve": serve}))
    return str(path)


def prune_all(store: Store, *words: str) -> Done:
    return prune(store.root, "--all", "--keep-recent", "0", *words)


def pins_of(store: Path, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(store, "pins", "list", "--json", *words).stdout)
    return found


def test_what_is_pinned_stays_until_its_pin_is_removed(store: Store) -> None:
    run(store.root, "pins", "add", "one:v1", "*/team/two:*")
    table = run(store.root, "pins", "list").stdout
    assert "*/team/two:*" in table
    assert "docker.io/library/one:v1" in table
    assert re.search(r"pins add +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", table, re.MULTILINE)
    done = prune_all(store)
    assert done.images == [NAMES[2]]
    assert done.summary["kept"]["pinned"] == 2
    assert all(listed(store.root).values())
    run(store.root, "pins", "remove", "one:v1")
    assert prune_all(store).images == [NAMES[0]]
    assert "no such pin" in run(store.root, "pins", "remove", "one:v1", code=2).stderr
    assert [each["pattern"] for each in pins_of(store.root)] == ["*/team/two:*"]


def test_a_pattern_that_no_stored_image_fits_is_named_and_pinned_all_the_same(
    store: Store,
) -> None:
    digest = f"quay.io/team/two@{TWO.digest}"
    added = run(store.root, "pins", "add", "one:v1", "*/team/tow:*", digest, "later:v1")
    assert added.stderr.splitlines() == [
        "nothing stored matches '*/team/tow:*' yet",
        "nothing stored matches 'docker.io/library/later:v1' yet",
    ]
    assert len(pins_of(store.root)) == 4


def test_what_was_pinned_takes_room_no_more_once_its_pin_is_removed(store: Store) -> None:
    run(store.root, "pins", "add", "*/team/*")
    prune(store.root, "--to-limits")
    files = {each.digest: each.size for made in (TWO, THREE) for each in made.all_content()}
    assert (store.usage.read() or Usage()).pinned == sum(files.values())
    run(store.root, "pins", "remove", "*/team/*")
    assert (store.usage.read() or Usage()).pinned == 0


def test_pins_of_the_configuration(store: Store) -> None:
    """A glob, a list and a lock; the preloaded images too."""
    folder = store.root.parent
    (folder / "images").write_text("one:v1\n")
    lock = {"digest": TWO.digest, "mediaType": TWO.top.media_type, "size": TWO.top.size}
    locked = {**lock, "reference": NAMES[1], "platforms": [], "complete": True}
    document = {"format": "ociproxy-lock/1", "images": [locked], "contents": []}
    (folder / "lock").write_text(json.dumps(document))
    config = configured(store, {"list": "images"}, {"lock": "lock"}, "*/three:*")
    assert len(pins_of(store.root, "--config-path", config)) == 3
    assert prune_all(store, "--config-path", config).images == []
    config = configured(store, preload_images=str(folder / "images"))
    assert set(prune_all(store, "--config-path", config).images) == set(NAMES[1:])


def test_a_kubernetes_manifest_in_the_place_of_a_list_is_called_that(store: Store) -> None:
    """Once, and not a problem for each of its lines."""
    (store.root.parent / "images").write_text("apiVersion: v1\nkind: Pod\nspec:\n  - image: one\n")
    config = configured(store, {"list": "images"})
    done = run(store.root, "pins", "list", "--config-path", config, code=2)
    assert "images: is a Kubernetes manifest: give it with --kubernetes, or list" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_lock_keeps_its_digest_though_the_tag_has_moved(store: Store) -> None:
    run(store.root, "pins", "add", f"quay.io/team/two@{TWO.digest}")
    put_aged(store, NAMES[1], THREE, 50)
    assert set(prune_all(store).images) == set(NAMES)
    assert listed(store.root) == {f"quay.io/team/two@{TWO.digest}": True}


def test_a_list_that_cannot_be_read_stops_the_prune(store: Store) -> None:
    """Else all that it names would go."""
    config = configured(store, {"list": "none"})
    done = run(store.root, "prune", "--all", "--config-path", config, code=2)
    assert "none" in done.stderr
    run(store.root, "pins", "add", "one:v1")
    [path] = (store.root / "pins").iterdir()
    path.write_text("{")
    assert "is not a pin" in run(store.root, "prune", "--all", code=4).stderr
    assert set(listed(store.root)) == set(NAMES)


def test_a_pinned_image_that_lacks_something_is_reported(store: Store) -> None:
    run(store.root, "pins", "add", *NAMES[:2], "quay.io/team/absent:v1")
    stored(store, TWO.layers[1]).unlink()
    done = prune_all(store)
    assert [(each["reference"], each["status"]) for each in done.events("pinned")] == [
        (NAMES[1], "incomplete"),
        ("quay.io/team/absent:v1", "not stored"),
    ]
    said = run(store.root, "prune", "--unreferenced").stderr.splitlines()
    assert said[0] == f"warning: {NAMES[1]} is pinned, but incomplete"
    assert set(listed(store.root)) == set(NAMES[:2])


def test_load_pins_what_it_loaded(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("app", image("app"), tag="v1")
    name = f"{upstream.registry}/app:v1"
    wanted = load.write(name, f"{upstream.registry}/none:v1")
    assert load.run(wanted, "--plan", "--pin").code == 3
    assert not (load.store / "pins").exists()
    assert load.run(wanted, "--pin").code == 3
    assert [(each["pattern"], each["by"]) for each in pins_of(load.store)] == [(name, "load")]
    prune_all(Store(load.store))
    assert listed(load.store) == {name: True}


def test_import_pins_what_it_imported(store: Store, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar"
    run(store.root, "export", str(archive))
    job = Import(tmp_path / "other")
    assert set(job.run("--pin", archive).statuses) == set(NAMES)
    assert {each["pattern"] for each in pins_of(job.store)} == set(NAMES)
    prune_all(Store(job.store))
    assert set(job.listed()) == set(NAMES)
