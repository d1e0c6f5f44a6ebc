"""`ociproxy pins`: list, add and remove what no prune removes; and all pins that hold."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy.archive.lock import read_lock_file
from ociproxy.cli.options import config_path, configuration, image_path
from ociproxy.cli.sources import read_wanted
from ociproxy.cli.table import print_table
from ociproxy.config.local_settings import PinSource
from ociproxy.errors import ConfigError
from ociproxy.oci.reference import Reference
from ociproxy.store.pruning.pins import Pin
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store


def all_pins(store: Store, config: Config, more: Path | None = None) -> Iterator[Pin]:
    """Those of the store and of the configuration, and what the image list `more` names. Raises
    ConfigError for a list that cannot be read, LockInvalid or StoreError."""
    yield from store.pins
    yield from configured_pins(config)
    if more is not None:
        yield from _pins_of(PinSource(list=more))


def configured_pins(config: Config) -> Iterator[Pin]:
    """Those of `store.pins`, and what `serve.preload_images` names. Raises ConfigError for a list
    that cannot be read, or LockInvalid."""
    yield from _pins_of(*config.store.pins, PinSource(list=config.serve.preload_images))


def _pins_of(*sources: str | PinSource) -> Iterator[Pin]:
    for each in sources:
        if isinstance(each, str):
            yield Pin.parse(each, "store.pins")
        elif each.list is not None:
            for wanted in read_wanted([str(each.list)], [], ()):
                yield Pin.of(wanted.reference, wanted.place)
        elif each.lock is not None:
            for image in read_lock_file(each.lock).images:
                digest = image.descriptor.digest
                yield Pin.of(Reference(image.reference.repository, None, digest), str(each.lock))


@click.group("pins")
def pins() -> None:
    """Say which images no prune removes."""


@pins.command("list", short_help="Print all pins.")
@image_path
@config_path
@click.option("--json", "as_json", is_flag=True, envvar="OCIPROXY_JSON", help="Print JSON.")
def list_pins(image_path: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Print all pins: those of the store, and those of the configuration."""
    config = configuration(config_path, image_path=image_path)
    found = list(all_pins(open_existing(config.store.path), config))
    if as_json:
        documents = [{"pattern": p.pattern, "by": p.by, "added": p.added or None} for p in found]
        click.echo(json.dumps(documents, indent=1))
    else:
        rows = ((p.pattern, p.by, p.added or "-") for p in found)
        print_table(("PATTERN", "BY", "ADDED"), rows, spare=("ADDED",))


@pins.command("add", short_help="Pin images.")
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@image_path
@config_path
def add(patterns: tuple[str, ...], image_path: Path | None, config_path: Path | None) -> None:
    """Pin images: no prune removes what PATTERN, a reference or a glob, matches."""
    store = open_existing(configuration(config_path, image_path=image_path).store.path)
    for pin in [Pin.parse(each, "pins add") for each in patterns]:
        store.pins.add(pin, time.time())


@pins.command("remove", short_help="Remove pins.")
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@image_path
@config_path
def remove(patterns: tuple[str, ...], image_path: Path | None, config_path: Path | None) -> None:
    """Remove pins; PATTERN is written as `pins list` prints it. The images stay until a prune."""
    store = open_existing(configuration(config_path, image_path=image_path).store.path)
    removed = [(each, store.pins.remove(Pin.parse(each, "").pattern)) for each in patterns]
    for pattern, found in removed:
        if not found:
            raise ConfigError("no such pin in the store: see `ociproxy pins list`", key=pattern)
