"""Kill the product hundreds of times and cut its power, then print a table: `make crashes`.

What fails is printed as it is found, and the exit code is 1. `--kills N` kills about as many times,
`--cuts N` cuts the power as often.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

from ociproxy.store.store import Store
from tests.disk.disk import faulty_disk
from tests.disk.examine import faults_of, left_behind
from tests.disk.operations import Entries, Operation, Write, crash
from tests.disk.runs import Runs, kill_parent, some_images, upstream_of
from tests.images import Content, Image
from tests.stores import damage, stored

REPAIR = ("check", "--repair")


class Table:
    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = {}

    def add(self, row: str, kind: str, faults: Sequence[str], where: object) -> None:
        counts = self.rows.setdefault(row, Counter())
        counts[kind] += 1
        for fault in faults:
            counts["faults"] += 1
            print(f"{row}, {where}: {fault}", flush=True)

    def __str__(self) -> str:
        lines = ["| Run | ended | times | faults |", "|---|---|---|---|"]
        for row, counts in self.rows.items():
            kinds = [kind for kind in counts if kind != "faults"]
            lines += [f"| {row} | {k} | {counts[k]} | {counts['faults']} |" for k in kinds]
        return "\n".join(lines)


def pull(runs: Runs, port: int) -> list[str]:
    """All that there is of the images, as a client: wrong bytes are faults, errors are none."""
    found = []
    for image in runs.images.values():
        for kind, content in parts(image):
            url = f"http://127.0.0.1:{port}/v2/app/{kind}/{content.digest}?ns={runs.registry}"
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    body = answer.read()
            except (OSError, HTTPException):
                continue
            if body != content.data:
                found.append(f"a client got other bytes: {content.digest}")
    return found


def parts(image: Image) -> list[tuple[str, Content]]:
    manifests = [("manifests", each) for each in image.all_manifests()]
    return manifests + [("blobs", each) for each in image.blobs]


def after_kill(runs: Runs, promised: Sequence[Image]) -> list[str]:
    """Faults now; and after a load, which has to make all whole and to leave nothing behind."""
    found = faults_of(runs.store, promised)
    code = runs.load()
    if code:
        found.append(f"the next load ended with {code}:\n{runs.said()}")
    found += faults_of(runs.store, list(runs.images.values()))
    Store(runs.store).staging.sweep(time.time() + 1)
    return found + [f"left in pulls/: {name}" for name in left_behind(runs.store)]


def damaged(runs: Runs) -> None:
    """A store that has all, some of it rotten."""
    runs.new_store(filled=True)
    store = Store(runs.store)
    damage(stored(store, runs.images["layers"].layers[0]))
    stored(store, runs.images["small"].layers[0]).unlink()


def kill_commands(runs: Runs, table: Table, share: float) -> None:
    """At every step, or at some of them."""
    repair = (*REPAIR, "--config-path", str(runs.config))
    rest = [runs.images["small"], runs.images["layers"]]
    cases: list[tuple[str, Callable[[], object], Callable[[], int], Sequence[Image]]] = [
        ("load", runs.new_store, runs.load, ()),
        (
            "prune",
            lambda: runs.new_store(filled=True),
            lambda: runs.run("prune", "*:multi", "--keep-recent", "0s"),
            rest,
        ),
        (
            "evict",
            lambda: runs.new_store(filled=True),
            lambda: runs.run("prune", "--to-limits", "--config-path", str(runs.capped)),
            rest,
        ),
        ("check --repair", lambda: damaged(runs), lambda: runs.run(*repair), ()),
    ]
    for name, prepare, run, promised in cases:
        prepare()
        runs.disk.kill_at(0)
        run()
        steps = runs.disk.steps()
        chosen = range(1, steps + 1) if share >= 1 else every(steps, share)
        for step in chosen:
            prepare()
            runs.disk.kill_at(step)
            code = run()
            said = runs.said()
            runs.disk.kill_at(0)
            kept = [*promised, *runs.reported(said)]
            found = after_kill(runs, kept)
            table.add(name, "killed at a step" if code == -9 else "done before", found, step)
        print(f"{name}: {steps} steps", flush=True)


def every(steps: int, share: float) -> Sequence[int]:
    return sorted(random.sample(range(1, steps + 1), max(1, int(steps * share))))


def kill_servers(runs: Runs, table: Table, times: int) -> None:
    """At a random step of the pulls of a client; then another server has to serve all."""
    for number in range(times):
        runs.new_store()
        step = random.randint(5, 250)
        with runs.serving() as (_, port):
            runs.disk.kill_at(step)
            found = pull(runs, port)
        runs.disk.kill_at(0)
        found += faults_of(runs.store)
        with runs.serving() as (_, port):
            found += pull(runs, port)
        table.add("serve", "killed", found + after_kill(runs, ()), f"{number}: {step}")


def kill_parents(runs: Runs, table: Table, times: int) -> None:
    """Servers whose eviction is at work, at a random step of that."""
    rest = [runs.images["small"], runs.images["layers"]]
    for number in range(times):
        runs.new_store(filled=True)
        step = random.randint(0, 60)
        with runs.serving(runs.capped) as (process, _):
            kill_parent(runs.disk, process, step)
        found = faults_of(runs.store, rest)
        with runs.serving() as (_, port):
            found += pull(runs, port)
        table.add("evict", "server killed", found + after_kill(runs, rest), f"{number}: {step}")


def cut_power(runs: Runs, folder: Path, table: Table, times: int) -> None:
    """During a load and a prune, and during a server's pulls: at random points of what was done
    to the disk."""
    for name in ("load and prune", "serve"):
        runs.new_store()
        report = runs.disk.root / f"report-{name.replace(' ', '-')}"
        if name == "serve":
            with runs.serving() as (_, port):
                pull(runs, port)
                time.sleep(1.5)  # what it took in is on the disk a second later
        else:
            runs.load(output=report)
            runs.run("prune", "*:multi", "--keep-recent", "0s")
        operations = runs.disk.operations()
        first = beginning(operations, runs.store.name)
        for number in range(times):
            source = random.Random(number)
            # In the end all is on the disk that the server took in.
            ended = name == "serve" and number % 4 == 0
            at = len(operations) if ended else source.randint(first, len(operations))
            left = folder / f"cut-{name}-{number}"
            crash(operations[:at], source, left, ordered=number % 2 == 0)
            reported = runs.reported(text_of(operations[:at], report.name))
            kept = [each for each in reported if each is not runs.images["multi"]]
            kept += runs.images.values() if ended else ()
            found = faults_of(left / runs.store.name, kept)
            if number % 5 == 0 and (left / runs.store.name).exists():
                found += reboot(runs, left / runs.store.name)
            how = "power cut, in order" if number % 2 == 0 else "power cut, out of order"
            table.add(name, how, found, f"{number}: {at} of {len(operations)}")


def reboot(runs: Runs, store: Path) -> list[str]:
    """Serve what the cut has left, then load."""
    before, runs.store = runs.store, store
    try:
        with runs.serving() as (_, port):
            found = pull(runs, port)
        return found + after_kill(runs, ())
    finally:
        runs.store = before


def beginning(operations: Sequence[Operation], store: str) -> int:
    """Where the folder of the store was made."""
    return next(
        index
        for index, each in enumerate(operations)
        if isinstance(each, Entries) and each.changes[0].name == store
    )


def text_of(operations: Sequence[Operation], name: str) -> str:
    """What was written to the files of this name, whether it survives or not."""
    made = [each for each in operations if isinstance(each, Entries) and each.made == "file"]
    numbers = {each.changes[0].number for each in made if each.changes[0].name == name}
    written = [e.data or b"" for e in operations if isinstance(e, Write) and e.number in numbers]
    return b"".join(written).decode(errors="replace")


def main(kills: int, cuts: int) -> int:
    table = Table()
    images = some_images("crash")
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as name,
        faulty_disk(Path(name)) as disk,
        upstream_of(images) as url,
    ):
        runs = Runs(disk, Path(name), url, images)
        cut_power(runs, Path(name), table, cuts // 2)
        servers = kills // 5
        kill_commands(runs, table, min(1.0, (kills - servers) / 550))
        kill_servers(runs, table, servers)
        kill_parents(runs, table, max(1, kills // 30))
    print(f"{table}\n{time.monotonic() - began:.0f} s")
    return 1 if any(counts["faults"] for counts in table.rows.values()) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make crashes")
    parser.add_argument("--kills", type=int, default=450)
    parser.add_argument("--cuts", type=int, default=100)
    given = parser.parse_args()
    sys.exit(main(given.kills, given.cuts))
