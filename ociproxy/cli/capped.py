"""Commands that fill a store which has a limit (`store.max_size`): they make room, or refuse.

Tests: tests/cli/test_capped_store.py.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ociproxy.cli.child import command_maker
from ociproxy.load.pins import all_pins
from ociproxy.serve.eviction import Eviction
from ociproxy.serve.housekeeping import Housekeeper
from ociproxy.store.limits import Limits
from ociproxy.store.pruning.pins import Pins
from ociproxy.store.pruning.plan import Selection, make_plan
from ociproxy.store.pruning.survey import Survey
from ociproxy.store.usage import Usage, size_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Reference
    from ociproxy.store.store import Store


@contextmanager
def capped(store: Store, config: Config, config_path: Path | None) -> Iterator[None]:
    """Inside, what comes into the store has to fit `store.max_size`. Images are removed for it by a
    child process, as a server does, unless one does so already. Raises StoreError."""
    if config.store.max_size is None:
        yield
        return
    offline = config.serve.offline
    store.room = store.room.within(config.store, must_keep=True, evicts=not offline)
    if offline:  # nothing is removed, nor counted
        _count(store)
        yield
        return
    keeper = Housekeeper(store, Eviction(store, config), command_maker(config_path), config)
    keeper.start()
    try:
        yield
    finally:
        keeper.stop()


def _count(store: Store) -> None:
    before, began = store.usage.read() or Usage(), time.time()
    size = sum(size_of(store.root / name)[1] for name in ("blobs", "fat", "img"))
    store.usage.record(size, before, freed=0, stuck=False, began=began)


def room_for(
    store: Store, config: Config, wanted: Container[Reference], new: int
) -> tuple[int, int] | None:
    """`store.max_size`, and the bytes that it leaves for a load of `wanted`, of which `new` are to
    come, once all has been removed that may be. None without that limit. Raises StoreError."""
    cap = Limits.of(config.store, store.root).max_size
    if cap is None:
        return None
    pins = Pins(all_pins(store, config, None))

    def stays(reference: Reference, digest: Digest) -> bool:
        return reference in wanted or pins.match(reference, digest)

    selection = Selection(to_size=max(0, cap - new), keep_recent=config.store.keep_recent)
    plan = make_plan(store, Survey(store), selection, is_pinned=stays, now=time.time())
    return cap, max(0, cap - plan.size + plan.freed)
