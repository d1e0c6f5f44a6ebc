"""`ociproxy survey`: what the store holds, for the admin listener of a server, which runs it as a
child: the walk takes memory and processor time that belong to clients.

Tests: tests/serve/admin/test_survey.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy.cli.list_command import document
from ociproxy.cli.options import config_path, configuration, image_path, json_events, log_format
from ociproxy.cli.terminal import print_event
from ociproxy.errors import OciProxyError
from ociproxy.load.pins import all_pins
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import Entry, inventory, references
from ociproxy.store.limits import size_of
from ociproxy.store.look import Look
from ociproxy.store.pruning.pins import Pins
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ociproxy.config.settings import Config
    from ociproxy.oci.digest import Digest
    from ociproxy.store.store import Store

KINDS = {"blob": "blobs", "index": "fat", "manifest": "img", "quarantined": "quarantine"}


@click.command("survey", hidden=True)
@image_path
@config_path
@log_format
@json_events
@click.option("--images", is_flag=True, help="Tell every image, too.")
def survey_command(
    image_path: Path | None,
    config_path: Path | None,
    log_format: str | None,
    as_json: bool,
    images: bool,
) -> None:
    """Print what the store holds, an event a line: bytes by kind, images, then what is pinned."""
    config = configuration(config_path, image_path=image_path, log_format=log_format)
    store = open_existing(config.store.path)
    for kind, folder in KINDS.items():
        objects, size = size_of(store.root / folder)
        print_event("kind", kind=kind, objects=objects, bytes=size)
    if images:
        _print_images(store, config)
    else:
        _print_pinned(store, config)
    print_event("end")


def _print_pinned(store: Store, config: Config) -> None:
    """Nothing is looked for where nothing is pinned."""
    try:
        found = list(all_pins(store, config))
    except OciProxyError:  # each prune says so
        return
    pins, look = Pins(found), Look(store)
    _tell_pinned(
        read_contents(store, reference.repository, top, look=look).sizes.items()
        for reference, top, _ in (references(store, look) if found else ())
        if pins.match(reference, top.digest)
    )


def _tell_pinned(images: Iterable[Iterable[tuple[Digest, int]]]) -> None:
    """How many they are, and their bytes: those of a shared blob once."""
    count = 0
    parts: dict[Digest, int] = {}
    for sizes in images:
        count += 1
        parts.update(sizes)
    print_event("pinned", objects=count, bytes=sum(parts.values()))


def _print_images(store: Store, config: Config) -> None:
    """With the bytes of each that other images have, too: what its removal would not free."""
    users: dict[Digest, int] = {}
    known: dict[Digest, Digest] = {}
    found = []
    for entry in inventory(store):
        for digest in entry.contents:
            digest = known.setdefault(digest, digest)
            users[digest] = users.get(digest, 0) + 1
        sizes = tuple((known[digest], size) for digest, size in entry.contents.items())
        found.append((_shown(entry), entry.reference, entry.digest, sizes))
    pins = Pins(all_pins(store, config))
    pinned = []
    for told, reference, top, sizes in found:
        shared = sum(size for digest, size in sizes if users[digest] > 1)
        is_pinned = pins.match(reference, top)
        if is_pinned:
            pinned.append(sizes)
        print_event("image", **told, shared=shared, pinned=is_pinned)
    _tell_pinned(pinned)


def _shown(entry: Entry) -> dict[str, object]:
    """What the page shows of an image in its list: a server keeps it in memory."""
    told = document(entry)
    places = [{"platform": str(e.platform or ""), "complete": e.complete} for e in entry.images]
    wanted = ("reference", "complete", "size", "lastUsed")
    return {**{name: told[name] for name in wanted}, "platforms": places}
