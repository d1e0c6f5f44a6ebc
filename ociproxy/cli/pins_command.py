"""`ociproxy pins`: list, add and remove what no prune removes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ociproxy.cli.options import config_path, configuration, image_path
from ociproxy.cli.table import print_table
from ociproxy.errors import ConfigError
from ociproxy.load.pins import all_pins
from ociproxy.store.inventory import references
from ociproxy.store.look import Look
from ociproxy.store.pruning.pins import Pin, Pins
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from ociproxy.store.store import Store


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
    pins = [Pin.parse(each, "pins add") for each in patterns]
    for pin in pins:
        store.pins.add(pin, time.time())
    for pattern in _unmatched(store, pins):
        click.echo(f"nothing stored matches {pattern!r} yet", err=True)


def _unmatched(store: Store, pins: list[Pin]) -> dict[str, Pins]:
    """By their patterns, those that no stored image fits. A glob with a typing error is told here,
    or nowhere: a prune does not know that it was to match something."""
    unmatched = {pin.pattern: Pins([pin]) for pin in pins}
    for reference, top, _ in references(store, Look(store)):
        if not unmatched:
            break
        for pattern in [p for p, pin in unmatched.items() if pin.match(reference, top.digest)]:
            del unmatched[pattern]
    return unmatched


@pins.command("remove", short_help="Remove pins.")
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@image_path
@config_path
def remove(patterns: tuple[str, ...], image_path: Path | None, config_path: Path | None) -> None:
    """Remove pins of the store; PATTERN is written as `pins list` prints it. The images stay until
    a prune. Pins of the configuration are removed there."""
    store = open_existing(configuration(config_path, image_path=image_path).store.path)
    removed = [(each, store.pins.remove(Pin.parse(each, "").pattern)) for each in patterns]
    for pattern, found in removed:
        if not found:
            where = "see `ociproxy pins list`; the configuration's pins are removed there"
            raise ConfigError(f"no such pin in the store: {where}", key=pattern)
    store.usage.forget_pinned()
