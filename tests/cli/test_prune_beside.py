"""`ociproxy prune` beside other processes on the same store: nothing that they promised is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ociproxy.store.claim import SILENT
from ociproxy.store.store import Store
from tests import forked
from tests.archive.importing import Import
from tests.images import MIB, Image, image, image_of, layer, random_bytes
from tests.load.loading import LIMIT, Load
from tests.pruning import (
    DAY,
    command,
    content_files,
    listed,
    names_of,
    prune,
    put_aged,
    sharing,
    write,
)
from tests.server import ROOT, Mirror, upstream_entry
from tests.stores import put
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

ROUNDS = 10

PRUNER = """
import sys
import click
from ociproxy.cli.prune_command import prune
from ociproxy.errors import Busy

store = sys.argv[1]
common = ["--image-path", store, "--keep-recent", "0"]
print("running", flush=True)
while True:
    for words in (["*/victim:*", "--all"], ["--unreferenced"]):
        try:
            prune.main([*words, *common], standalone_mode=False)
        except Busy as error:
            print("busy", error, flush=True)
"""


@contextlib.contextmanager
def pruning(store: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that removes what it may without a pause: victims, and what no image needs."""
    with subprocess.Popen(
        [sys.executable, "-c", PRUNER, str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ,
    ) as process:
        said: list[str] = []
        assert process.stdout is not None
        stdout = process.stdout
        reader = threading.Thread(target=lambda: said.extend(stdout))
        reader.start()
        try:
            yield process
            assert process.poll() is None, process.communicate()[1]
        finally:
            process.kill()
            reader.join()
    assert sum("removed" in line and "/victim:" in line for line in said) > 0


def test_what_a_load_reported_is_whole_whatever_is_pruned_beside_it(
    upstream: FakeUpstream, load: Load
) -> None:
    """Thirty rounds: the images share layers with those that are removed at that moment."""
    Store(load.store)
    with pruning(load.store):
        for number in range(ROUNDS):
            names = [f"kept-{number}-{n}" for n in range(3)]
            victim, *kept = sharing(f"victim-{number}", *names, size=20_000)
            write(Store(load.store), "quay.io/team/victim:v1", victim)
            for name, made in zip(names, kept, strict=True):
                upstream.add(f"team/{name}", made, tag="v1")
            wanted = [f"{upstream.registry}/team/{name}:v1" for name in names]
            done = load.run(load.write(*wanted), "--json")
            assert done.code == 0, done.stdout
            assert set(wanted) <= load.complete()
            for made in kept:
                assert load.has(made)
    assert all(complete for name, complete in listed(load.store).items() if "/kept-" in name)


def test_what_an_import_reported_is_whole_whatever_is_pruned_beside_it(tmp_path: Path) -> None:
    source, job = Store(tmp_path / "source"), Import(tmp_path)
    root = job.store
    Store(root)
    with pruning(root):
        for number in range(ROUNDS // 3):
            name = f"kept-{number}"
            victim, kept = sharing(f"victim-{number}", name, size=20_000)
            put(source, f"quay.io/team/{name}:v1", kept)
            archive = tmp_path / f"{name}.tar"
            export = command(source.root, "export", str(archive), f"*/{name}:v1")
            subprocess.run(export, check=True, capture_output=True, cwd=ROOT)
            write(Store(root), "quay.io/team/victim:v1", victim)
            assert job.run(archive).statuses == {f"quay.io/team/{name}:v1": "imported"}
            assert listed(root)[f"quay.io/team/{name}:v1"]
    assert all(complete for name, complete in listed(root).items() if "/kept-" in name)


def with_base(name: str) -> list[Image]:
    """An image, and one that has its first layer in common with it."""
    base = layer({"base": random_bytes(200_000, seed=f"base of {name}")})
    own = [layer({each: random_bytes(2000, seed=each)}) for each in (name, f"{name} victim")]
    return [image_of([base, each], command=[name]) for each in own]


def wait_for(happened: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.02)


@contextlib.contextmanager
def killed(process: subprocess.Popen[Any]) -> Iterator[None]:
    """In the end."""
    try:
        yield
    finally:
        process.kill()


@contextlib.contextmanager
def stopped(process: subprocess.Popen[Any], store: Path) -> Iterator[None]:
    """Inside, it is stopped, and was so for longer than other processes wait for it."""
    [held] = (store / "pulls").glob(".write-using-*")
    touched = held.stat().st_mtime_ns
    wait_for(lambda: held.stat().st_mtime_ns != touched)  # it says that it works
    assert prune(store, "--all", "--keep-recent", "0").content == []
    process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    long_ago = time.time() - SILENT - 1
    os.utime(held, (long_ago, long_ago))
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_stopped_load_keeps_nothing_and_publishes_no_image_that_lacks_what_went(
    upstream: FakeUpstream, load: Load
) -> None:
    """The layer that two images share with old ones goes while the load is stopped. One of the two
    layers is at the upstream still."""
    store, names, made = Store(load.store), ["there", "lost"], {}
    for name in names:
        made[name], victim = with_base(name)
        put_aged(store, f"quay.io/team/victim-{name}:v1", victim, 60)
        upstream.add(f"team/{name}", made[name], tag="v1")
        upstream.fault(f"/blobs/{made[name].layers[1].digest}", Fault(stall_after=0))
    upstream.fault(f"/blobs/{made['lost'].layers[0].digest}", Fault(status=404))
    wanted = [f"{upstream.registry}/team/{name}:v1" for name in names]
    bases = [load.store / "blobs" / made[name].layers[0].encoded for name in names]
    with load.start(load.write(*wanted)) as process, killed(process):
        wait_for(
            lambda: all(time.time() - base.stat().st_atime < DAY for base in bases)
        )  # seen there
        wait_for(lambda: all(upstream.seen(made[name].layers[1].digest) for name in names))
        with stopped(process, load.store):
            removed = prune(load.store, "--all", "--keep-recent", "0").images
            assert set(removed) == {f"quay.io/team/victim-{name}:v1" for name in names}
            assert not any(base.exists() for base in bases)
            upstream.release()
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 3, errors
    assert load.complete() == load.cached() == {wanted[0]}
    assert load.has(made["there"])


def test_a_stopped_import_keeps_nothing_and_publishes_no_image_that_lacks_what_went(
    tmp_path: Path,
) -> None:
    source, job = Store(tmp_path / "source"), Import(tmp_path)
    made, victim = with_base("app")
    put(source, "quay.io/team/app:v1", made)
    put_aged(Store(job.store), "quay.io/team/victim:v1", victim, 60)
    archive = tmp_path / "app.tar"
    forked.run(command(source.root, "export", str(archive)), check=True, cwd=ROOT)
    raw = archive.read_bytes()
    base = job.store / "blobs" / made.layers[0].encoded
    with (
        forked.popen(
            job.command("--json", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        ) as process,
        killed(process),
    ):
        assert process.stdin is not None
        end = len(raw) - 100_000  # in the midst of the layer that is there, the last one
        process.stdin.write(raw[:end])
        process.stdin.flush()
        wait_for(lambda: time.time() - base.stat().st_atime < DAY)  # it is there
        with stopped(process, job.store):
            assert prune(job.store, "--all", "--keep-recent", "0").images
            assert not base.exists()
        said, _ = process.communicate(raw[end:], timeout=LIMIT)
    assert process.returncode == 5, said
    [event] = [event for event in map(json.loads, said.splitlines()) if event["event"] == "image"]
    assert event["status"] == "incomplete"
    told = f"layer {made.layers[0].digest}: neither here nor in the store"
    assert event["problems"] == [told]
    assert listed(job.store) == {}


def test_a_prune_that_is_killed_leaves_no_image_that_lacks_something(tmp_path: Path) -> None:
    """Killed after any number of steps: an image is whole, or it is not there."""
    store = Store(tmp_path)
    kept = sharing(*(f"kept-{n}" for n in range(5)))
    for number, made in enumerate(kept):
        put_aged(store, f"quay.io/kept/image:{number}", made, 1)
    chance = random.Random("kills")  # reproducible, not secret
    for number in range(ROUNDS):
        gone = sharing(*(f"gone-{number}-{n}" for n in range(8)))
        for each, made in enumerate(gone):
            put_aged(store, f"quay.io/gone/image-{each}:v1", made, 60)
        at, total = chance.random(), len(content_files(tmp_path)) - len(names_of(*kept))
        with subprocess.Popen(
            command(tmp_path, "prune", "quay.io/gone/*", "--keep-recent", "0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        ) as process:
            limit = time.monotonic() + LIMIT
            while process.poll() is None and time.monotonic() < limit:
                walked = os.walk(tmp_path / "refs/quay.io/gone")
                refs = sum(len(files) for _, _, files in walked)
                left = len(content_files(tmp_path)) - len(names_of(*kept))
                if refs + left <= at * (2 * len(gone) + total):
                    process.send_signal(signal.SIGKILL)
                    break
        assert all(listed(tmp_path).values()), listed(tmp_path)
    prune(tmp_path, "quay.io/gone/*", "--keep-recent", "0")
    prune(tmp_path, "--unreferenced", "--keep-recent", "0")
    assert content_files(tmp_path) == names_of(*kept)
    assert all(listed(tmp_path).values())
    assert list((tmp_path / "pulls").iterdir()) == []


def test_an_export_finds_all_that_it_began_to_write(tmp_path: Path) -> None:
    store, made = Store(tmp_path / "store"), image("app", layers=3, layer_size=MIB)
    put_aged(store, "quay.io/team/app:v1", made, 60)
    prune_all = ("--all", "--keep-recent", "0")
    with subprocess.Popen(
        command(store.root, "export", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)  # it waits for a reader now
        assert prune(store.root, *prune_all).summary["kept"]["reading"] == 1
        rest, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors
    archive = tmp_path / "archive.tar"
    archive.write_bytes(begun + rest)
    done = Import(tmp_path / "other").run(archive)
    assert done.statuses == {"quay.io/team/app:v1": "imported"}
    prune(store.root, *prune_all, code=0)


@pytest.mark.parametrize("size", [2 * MIB, 24 * MIB], ids=["in chunks", "by sendfile"])
def test_a_response_ends_whole_whose_blob_is_removed_meanwhile(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], size: int
) -> None:
    made = upstream.add("team/app", image("app", layer_size=size), tag="v1")
    layer = made.layers[0]
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.manifest(upstream.registry, "team/app", "v1")
    for blob in made.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")
    connection = server.connect()
    with contextlib.closing(connection):
        connection.request("GET", f"/v2/team/app/blobs/{layer.digest}?ns={upstream.registry}")
        response = connection.getresponse()
        hashed = hashlib.sha256(response.read(1000))
        removed = prune(server.store, "*/team/app:v1", "--all", "--keep-recent", "0")
        assert ("blob", layer.digest, layer.size) in removed.content
        while data := response.read(100_000):
            hashed.update(data)
    assert hashed.hexdigest() == layer.encoded
    assert content_files(server.store) == set()
    # And the next pull brings the image again, blobs in the background.
    assert server.manifest(upstream.registry, "team/app", "v1").digest == made.digest
    assert server.blob(upstream.registry, "team/app", layer.digest).body == layer.data
    server.wait_for(lambda: all(listed(server.store).values()), "complete again")
