"""Signatures that have a tag of their own go and stay with the image that they are of."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ociproxy.store.pruning.pins import Pin, Pins
from ociproxy.store.pruning.plan import Selection, make_plan
from ociproxy.store.pruning.survey import Survey
from ociproxy.store.store import Store
from tests.images import Image, image
from tests.pruning import DAY, listed, prune, put_aged

APP = image("app", layers=1)
SIGNATURE = image("signature of app", layers=1)
OVER = image("signature of the signature", layers=1)
NAME = "quay.io/team/app:v1"


def tag_of(made: Image) -> str:
    return f"quay.io/team/app:sha256-{made.digest.partition(':')[2]}.sig"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An image that was used yesterday, and its signatures, which were not for long."""
    store = Store(tmp_path)
    put_aged(store, NAME, APP, 1)
    put_aged(store, tag_of(APP), SIGNATURE, 60)
    put_aged(store, tag_of(SIGNATURE), OVER, 60)
    return store


def going(store: Store, *patterns: str, pins: tuple[str, ...] = (), **limits: float) -> set[str]:
    selection = Selection(patterns=patterns, keep_recent=0.0, **limits)  # type: ignore[arg-type]
    pinned = Pins(Pin.parse(each, "") for each in pins)
    plan = make_plan(store, Survey(store), selection, is_pinned=pinned.match, now=time.time())
    return {str(each.reference) for each in plan.images}


def test_signatures_go_with_their_image(store: Store) -> None:
    done = prune(store.root, NAME, "--keep-recent", "0")
    assert done.images == [NAME, tag_of(APP), tag_of(SIGNATURE)]
    assert listed(store.root) == {}


def test_signatures_stay_with_their_image(store: Store) -> None:
    assert going(store, unused_for=30 * DAY) == set()
    assert going(store, "*/team/*", unused_for=30 * DAY) == set()
    assert going(store, pins=(NAME,)) == set()
    size = sum(each.size for each in Survey(store).blobs.values())
    assert going(store, to_size=size - 1) == {NAME, tag_of(APP), tag_of(SIGNATURE)}


def test_a_pattern_may_name_signatures_alone(store: Store) -> None:
    assert going(store, "*:sha256-*") == {tag_of(APP), tag_of(SIGNATURE)}
    assert going(store, tag_of(SIGNATURE)) == {tag_of(SIGNATURE)}


def test_a_pinned_signature_stays_without_its_image(store: Store) -> None:
    assert going(store, NAME, pins=(tag_of(APP),)) == {NAME}


def test_what_a_moved_tag_left_behind_takes_its_signature_along(tmp_path: Path) -> None:
    store, moved = Store(tmp_path), image("app, newer", layers=1)
    put_aged(store, NAME, APP, 60)
    put_aged(store, NAME, moved, 60)
    put_aged(store, tag_of(APP), SIGNATURE, 60)
    put_aged(store, tag_of(moved), OVER, 60)
    left = f"quay.io/team/app@{APP.digest}"
    assert going(store, unreferenced=True) == {left, tag_of(APP)}


def test_a_signature_without_its_image_is_an_image_as_any_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put_aged(store, tag_of(APP), SIGNATURE, 60)
    assert going(store, unused_for=30 * DAY) == {tag_of(APP)}
