"""Archives: a gigabyte into a store and out of it, against tar and cp.

`import` and `export` verify every byte, and wait until all of it is on the disk; so tar and cp are
measured with a `sync` after them too. Rounds go over all rivals before the next one begins, and
times are medians. What is read is in the page cache for all of them, and memory for what they
write is at hand; of more bytes than that all have to wait for the disk, and nothing is cached.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

from bench.processes import BenchError
from bench.results import Plan, Results
from bench.servers import OCIPROXY
from tests import images, layouts

TAR, TAR_SYNC, CP, CP_SYNC = TOOLS = ("tar", "tar, sync", "cp", "cp, sync")
_TOUCH = """
import mmap
mmap.mmap(-1, {size}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
"""
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LAYERS = ((48, 2), (4, 4), (1, 12))
"""MiB of a layer, and how many of them an image has."""


@dataclass(frozen=True)
class Rival:
    """A shell command; `{to}` is a new folder, `{source}` is the archive, or the store."""

    name: str
    command: str


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


OURS = f"{sys.executable} -m ociproxy"
IMPORT = (
    Rival(OCIPROXY, f"{OURS} import {{source}} --image-path {{to}}"),
    Rival(TAR, "tar xf {source} -C {to}"),
    Rival(TAR_SYNC, "tar xf {source} -C {to} && sync -f {to}"),
    Rival(CP, "cp {source} {to}/x"),
    Rival(CP_SYNC, "cp {source} {to}/x && sync -f {to}/x"),
)
EXPORT = (
    Rival(OCIPROXY, f"{OURS} export {{to}}/x.tar --image-path {{source}}"),
    Rival(TAR, "tar cf {to}/x.tar -C {source} ."),
    Rival(TAR_SYNC, "tar cf {to}/x.tar -C {source} . && sync -f {to}/x.tar"),
    Rival(CP, "cp -a {source} {to}"),
    Rival(CP_SYNC, "cp -a {source} {to} && sync -f {to}"),
)


def make_archive(folder: Path, count: int) -> Path:
    """Images of random layers, one in memory at a time."""
    names: list[tuple[str, images.Content]] = []
    for number in range(count):
        layers = [
            images.content(os.urandom(size * images.MIB), images.OCI_LAYER)
            for size, many in LAYERS
            for _ in range(many)
        ]
        made = images.image_of(images.Layer(each, each.digest) for each in layers)
        names.append((f"bench.example/app-{number}:1", made.top))
        files = ((layouts.blob_path(each), each.data) for each in made.all_content())
        layouts.write_folder(folder / "layout", files)
    documents = [("oci-layout", layouts.MARKER), ("index.json", layouts.index_json(names))]
    layouts.write_folder(folder / "layout", documents)
    archive = folder / "archive.tar"
    subprocess.run(
        ["tar", "cf", archive, "-C", folder / "layout", "oci-layout", "index.json", "blobs"],
        check=True,
    )
    shutil.rmtree(folder / "layout")
    return archive


def make_ready(size: int) -> None:
    """The same memory for everybody who handles so many bytes. Raises BenchError.

    The host of a virtual machine takes back what is unused, and gives it again page by page, slower
    than a disk writes: unless it is fetched before, times are those of whoever finds more of it.
    """
    os.sync()
    if 4 * size <= MEMORY:
        subprocess.run([sys.executable, "-c", _TOUCH.format(size=2 * size)], check=True)
        return
    try:
        DROP_CACHES.write_text("3")
    except OSError as error:
        raise BenchError(f"only root can measure more than memory holds: {error}") from error


def measure(rival: Rival, work: Path, source: Path, size: int, into: Measured) -> None:
    target = Path(mkdtemp(prefix="to-", dir=work))
    command = rival.command.format(to=target, source=source)
    make_ready(size)
    begun = time.perf_counter()
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}" if "&&" not in command else command],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    into.seconds.append(time.perf_counter() - begun)
    into.peak = max(into.peak, usage.ru_maxrss * 1024 / 1e6)
    shutil.rmtree(target)
    if process.returncode != 0:
        raise BenchError(f"{rival.name}: {said[-300:].decode(errors='replace')}")


def rounds(
    rivals: tuple[Rival, ...], work: Path, source: Path, size: int, count: int
) -> dict[str, Measured]:
    """In another order each round, since what ran before decides which memory the kernel has at
    hand."""
    order = random.Random(size)
    measured = {each.name: Measured() for each in rivals}
    for _ in range(count):
        for rival in order.sample(rivals, len(rivals)):
            measure(rival, work, source, size, measured[rival.name])
    return measured


def archives(work: Path, plan: Plan, results: Results) -> None:
    # Each in a process of its own: what a fork inherits counts as the peak of who is started.
    context = get_context("spawn")
    done: dict[str, dict[str, Measured]] = {}
    count = plan.archive_rounds
    try:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            archive = pool.submit(make_archive, work, plan.archive_images).result()
            size = archive.stat().st_size
            done["import"] = pool.submit(rounds, IMPORT, work, archive, size, count).result()
            store = work / "archive-store"
            command = IMPORT[0].command.format(source=archive, to=store)
            subprocess.run(["sh", "-c", command], check=True, capture_output=True)
            archive.unlink()  # or a disk would have to hold three of them
            done["export"] = pool.submit(rounds, EXPORT, work, store, size, count).result()
    except (BenchError, subprocess.CalledProcessError) as error:
        results.note(f"archive: {error}")
        return
    for what, measured in done.items():
        for name, each in measured.items():
            results.put(what, name, each.median)
            results.put(f"{what}_rate", name, size / 1e9 / each.median)
            results.put(f"{what}_peak", name, each.peak)
    results.note(f"archive: {plan.archive_images} images, {size / 1e6:.0f} MB, {count} rounds")
