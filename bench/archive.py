"""`python -m bench.archive`: a gigabyte into a store and out of it, against tar and cp.

`import` and `export` verify every byte, and wait until all of it is on the disk; so tar and cp are
measured with a `sync` after them too. Rounds go over all rivals before the next one begins, and
times are medians. What is read is in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import os
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
from tests import images, layouts

TARGET = 0.8
MEMORY_TARGET = 90.0
LAYERS = ((48, 2), (4, 4), (1, 12))
"""MiB of a layer, and how many of them an image has."""


@dataclass(frozen=True)
class Rival:
    """A shell command; `{to}` is a new folder, `{archive}` and `{store}` are what there is."""

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
    Rival("ociproxy import", f"{OURS} import {{archive}} --image-path {{to}}"),
    Rival("tar x", "tar xf {archive} -C {to}"),
    Rival("tar x, sync", "tar xf {archive} -C {to} && sync -f {to}"),
    Rival("cp", "cp {archive} {to}/x"),
    Rival("cp, sync", "cp {archive} {to}/x && sync -f {to}/x"),
)
EXPORT = (
    Rival("ociproxy export", f"{OURS} export {{to}}/x.tar --image-path {{store}}"),
    Rival("tar c", "tar cf {to}/x.tar -C {store} ."),
    Rival("tar c, sync", "tar cf {to}/x.tar -C {store} . && sync -f {to}/x.tar"),
    Rival("cp", "cp -a {store} {to}"),
    Rival("cp, sync", "cp -a {store} {to} && sync -f {to}"),
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


def measure(rival: Rival, work: Path, archive: Path, store: Path, into: Measured) -> None:
    target = Path(mkdtemp(prefix="to-", dir=work))
    command = rival.command.format(to=target, archive=archive, store=store)
    os.sync()
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


def table(rivals: tuple[Rival, ...], measured: dict[str, Measured], size: int) -> list[str]:
    ours = measured[rivals[0].name]
    lines = [f"{'':20}{'s':>8}{'GB/s':>8}{'ours to it':>12}{'peak RSS, MB':>14}"]
    for rival in rivals:
        each = measured[rival.name]
        rate, ratio = size / 1e9 / each.median, each.median / ours.median
        lines.append(f"{rival.name:20}{each.median:8.2f}{rate:8.2f}{ratio:12.2f}{each.peak:14.1f}")
    for rival in rivals[1:]:
        ratio = measured[rival.name].median / ours.median
        met = "met" if ratio >= TARGET else "NOT MET"
        lines.append(f"target: >= {TARGET} x {rival.name}: {ratio:.2f} x, {met}")
    met = "met" if ours.peak <= MEMORY_TARGET else "NOT MET"
    lines.append(f"target: peak RSS <= {MEMORY_TARGET:.0f} MB: {ours.peak:.1f} MB, {met}")
    return [*lines, ""]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.archive", description=__doc__)
    parser.add_argument("--images", type=int, default=8, help="of 124 MiB each (8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where everything goes (default: the system's)")
    options = parser.parse_args(arguments)
    work = Path(mkdtemp(prefix="ociproxy-bench-", dir=options.dir))
    try:
        # In a process of its own: what a fork inherits counts as its peak.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            archive = pool.submit(make_archive, work, options.images).result()
        store = work / "store"
        size = archive.stat().st_size
        command = IMPORT[0].command.format(archive=archive, to=store)
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
        lines = [f"{size / 1e6:.0f} MB in {options.images} images, {os.cpu_count()} cores", ""]
        for rivals in (IMPORT, EXPORT):
            measured = {rival.name: Measured() for rival in rivals}
            for _ in range(options.rounds):
                for rival in rivals:
                    measure(rival, work, archive, store, measured[rival.name])
            lines += table(rivals, measured, size)
    except (BenchError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.stdout.write("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
