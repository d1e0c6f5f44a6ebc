"""A store after a kill or a power cut at any step: it says nothing that is not so.

The short form of `make crashes`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.store.store import Store
from tests.disk.disk import Disk, faulty_disk
from tests.disk.examine import faults_of, left_behind
from tests.disk.operations import crash
from tests.disk.runs import kill_parent
from tests.images import image, multi_platform
from tests.server import Mirror
from tests.stores import put

KEPT = image("kept")
OTHER = multi_platform("other", platforms=("linux/amd64",))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with faulty_disk(tmp_path / "faulty") as made:
        yield made


def write(root: Path) -> None:
    put(Store(root), "reg.example/app:other", OTHER, resolved=time.time())


def prune(root: Path) -> None:
    words = ["prune", "*:other", "--keep-recent", "0s", "--image-path", str(root)]
    assert CliRunner().invoke(main, words).exit_code == 0


def evict(root: Path) -> None:
    """As the child of a server does it. One image is pinned, the other has to go."""
    config = root.parent / f"{root.name}.yaml"
    config.write_text("store: {max_size: 1000, min_free: 0, pins: ['*:kept']}")
    words = ["prune", "--to-limits", "--keep-recent", "0s", "--config-path", str(config)]
    done = CliRunner().invoke(main, [*words, "--image-path", str(root)])
    assert done.exit_code == 3  # what is pinned is larger


def in_child(work: Callable[[Path], None], root: Path) -> int:
    """How it ended: 0, or the signal as a negative number."""
    child = os.fork()
    if not child:
        try:
            work(root)
        except BaseException:  # noqa: BLE001 the child may not go on as a second pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("work", [write, prune, evict])
def test_a_kill_at_any_step_leaves_a_store_that_may_be_believed(
    disk: Disk, work: Callable[[Path], None]
) -> None:
    for step in range(1, 200, 5 if work is evict else 3):
        root = disk.root / str(step)
        put(Store(root), "reg.example/app:kept", KEPT)
        if work is not write:
            write(root)
        disk.kill_at(step)
        code = in_child(work, root)
        disk.kill_at(0)
        assert faults_of(root, [KEPT]) == [], step
        work(root)
        assert faults_of(root, [KEPT, OTHER] if work is write else [KEPT]) == [], step
        Store(root).staging.sweep(time.time() + 1)
        assert left_behind(root) == [], step
        if code == 0:
            assert step > 20
            return
        assert code == -9
    raise AssertionError("more steps than were tried")


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "out of order"])
def test_a_power_cut_at_any_point_leaves_a_store_that_may_be_believed(
    disk: Disk, tmp_path: Path, *, ordered: bool
) -> None:
    root = disk.root / "store"
    put(Store(root), "reg.example/app:kept", KEPT)
    kept = len(disk.operations())
    write(root)
    written = len(disk.operations())
    prune(root)
    operations = disk.operations()
    for at in range(0, len(operations) + 1, 2):
        promised = [KEPT] if at >= kept else []
        promised += [OTHER] if at == written else []
        left = tmp_path / f"left-{at}"
        crash(operations[:at], random.Random(at), left, ordered=ordered)
        assert faults_of(left / "store", promised) == [], at


def test_an_eviction_whose_server_is_killed_leaves_a_store_that_may_be_believed(
    disk: Disk, mirror: Callable[..., Mirror]
) -> None:
    root = disk.root / "store"
    put(Store(root), "reg.example/app:kept", KEPT)
    write(root)
    limit = {"max_size": 1000, "min_free": 0, "keep_recent": "0s", "pins": ["*:kept"]}
    server = mirror({"store": limit}, store=root)
    assert server.process is not None
    kill_parent(disk, server.process.pid, 6)
    server.kill()  # waits for it
    assert faults_of(root, [KEPT]) == []
    evict(root)
    assert faults_of(root, [KEPT]) == []
    assert not any((root / "blobs" / each.encoded).exists() for each in OTHER.blobs)
    Store(root).staging.sweep(time.time() + 1)
    assert left_behind(root) == []
