"""All pins that hold: of the store, of the configuration, and of the lists and locks it names.

Tests: tests/cli/test_pins_command.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ociproxy.archive.lock import read_lock_file
from ociproxy.config.local_settings import PinSource
from ociproxy.config.reading import decode, read_file
from ociproxy.load.imagelist import SIZE_LIMIT, ImageListInvalid, merged, parse_list
from ociproxy.oci.reference import Reference
from ociproxy.store.pruning.pins import Pin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.load.imagelist import Wanted
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
            for wanted in listed_images(each.list):
                yield Pin.of(wanted.reference, wanted.place)
        elif each.lock is not None:
            for image in read_lock_file(each.lock).images:
                digest = image.descriptor.digest
                yield Pin.of(Reference(image.reference.repository, None, digest), str(each.lock))


def listed_images(path: Path) -> list[Wanted]:
    """Those of an image list. Raises ConfigError where it cannot be read, or a line is bad."""
    wanted, problems = parse_list(
        decode(read_file(path, SIZE_LIMIT), str(path), "utf-8-sig"), str(path)
    )
    if problems:
        raise ImageListInvalid(problems)
    return merged(wanted)
