"""`python -m bench`: ociproxy against its rivals, one run on loopback, one report."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from bench.archive import archives
from bench.cold_manifests import cold_manifests
from bench.counting import counting
from bench.images import push_images
from bench.load import loading
from bench.neighbours import neighbours
from bench.processes import BenchError
from bench.report import table, write_json
from bench.results import Plan, Results, say
from bench.scale import scale
from bench.servers import Upstream, rivals, start_upstream
from bench.serving import SERVING, Bench, start_warm

# Above this load average the numbers say more about the neighbours.
BUSY = 0.5
LOAD = "load"
ARCHIVE = "archive"
NEIGHBOURS = "neighbours"
SCALE = "scale"
COUNTING = "counting"
BESIDE_WARM = {**SERVING, "cold-manifests": cold_manifests}
"""What is measured while a warm server of each kind runs."""
GROUPS = (*BESIDE_WARM, NEIGHBOURS, LOAD, ARCHIVE, SCALE, COUNTING)
FULL = Plan(
    rounds=4,
    cold_rounds=9,
    cold_manifests=2000,
    warm_rounds=3,
    warm_seconds=1.5,
    wrk_seconds=2,
    slow_seconds=8.0,
    stampede_of_drayage=True,
    limit=270.0,
    load_images=(20, 100),
    load_rounds=5,
    archive_images=8,
    archive_rounds=5,
    neighbour_blobs=40,
    scale_manifests=100_000,
    counting_rounds=240,
)
QUICK = Plan(
    rounds=1,
    cold_rounds=1,
    cold_manifests=500,
    warm_rounds=1,
    warm_seconds=0.6,
    wrk_seconds=1,
    slow_seconds=4.0,
    stampede_of_drayage=False,
    limit=60.0,
    load_images=(20,),
    load_rounds=1,
    archive_images=2,
    archive_rounds=1,
    neighbour_blobs=10,
    scale_manifests=10_000,
    counting_rounds=60,
)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="these rows (repeatable)")
    parser.add_argument("--rival", action="append", help="these servers (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one short round of everything")
    parser.add_argument("--size", type=int, default=200, metavar="MIB", help="of the blob (200)")
    parser.add_argument(
        "--archive-images", type=int, metavar="COUNT", help="in the archive that is carried (8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--dir", type=Path, help="where the stores go (default: the system's)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, work: Path, results: Results) -> None:
    """Everything started here is ended by the stack, in reverse order."""
    plan = QUICK if options.quick else FULL
    if options.archive_images is not None:
        plan = replace(plan, archive_images=options.archive_images)
    groups = [name for name in GROUPS if options.only is None or name in options.only]
    serving = [name for name in groups if name in BESIDE_WARM]
    if NEIGHBOURS in groups:
        with timed(NEIGHBOURS):
            neighbours(work, plan, results)
    with contextlib.ExitStack() as stack:
        if serving or LOAD in groups:
            (work / "upstream").mkdir()
            upstream = start_upstream(work / "upstream")
            stack.callback(upstream.process.stop)
            if serving:
                serve(options, serving, work, upstream, plan, results)
            if LOAD in groups:
                with timed(LOAD):
                    loading(work, upstream, plan, results)
    if ARCHIVE in groups:
        with timed(ARCHIVE):
            archives(work, plan, results)
    if SCALE in groups:
        with timed(SCALE):
            scale(work, plan, results)
    if COUNTING in groups:
        with timed(COUNTING):
            counting(work, plan, results)


def serve(
    options: argparse.Namespace,
    groups: list[str],
    work: Path,
    upstream: Upstream,
    plan: Plan,
    results: Results,
) -> None:
    with contextlib.ExitStack() as stack:
        (work / "static").mkdir()
        say("pushing images")
        images = push_images(upstream.target, work / "static", options.size << 20)
        # What was just written must not be flushed under the first measurement.
        os.sync()
        wanted = [
            rival
            for rival in rivals(work / "static")
            if options.rival is None or rival.name in options.rival
        ]
        bench = Bench(work, upstream, images, wanted, {}, plan, results)
        say("starting servers")
        start_warm(bench, stack)
        for name in groups:
            with timed(name):
                BESIDE_WARM[name](bench)


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    begun = time.perf_counter()
    say(name)
    yield
    say(f"  {time.perf_counter() - begun:.0f} s")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _allow_many_sockets()
    # As installed, ociproxy has its bytecode; compiling it anew at each start measures Python.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    results = Results()
    if (load := os.getloadavg()[0]) > BUSY:
        results.note(f"the machine was not idle at the start: load average {load:.1f}")
    started = time.perf_counter()
    work = Path(mkdtemp(prefix="ociproxy-bench-", dir=options.dir))
    try:
        run(options, work, results)
    except BenchError as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - started
    sys.stdout.write(table(results, size=options.size << 20, seconds=seconds))
    if options.json is not None:
        write_json(options.json, results, size=options.size << 20, seconds=seconds)
    return 0


def _allow_many_sockets() -> None:
    """256 slow clients on both ends do not fit under the usual soft limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
