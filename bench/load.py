"""`python -m bench.load`: many images with shared layers into a store, against skopeo.

The upstream is a real docker-registry; its own access log counts the bytes. Rounds go over all
rivals before the next one begins; times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from bench.images import TAG, push_family
from bench.processes import BenchError
from bench.servers import Upstream, find, start_upstream

LIMIT = 300.0
PARALLEL = 4
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'
OURS = "ociproxy load"


@dataclass(frozen=True)
class Rival:
    """`command` gets an empty folder, and says what to run."""

    name: str
    command: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Round:
    seconds: float
    upstream_bytes: int


def rivals(work: Path, upstream: Upstream, repositories: list[str]) -> list[Rival]:
    names = [f"{upstream.host}/{repository}:{TAG}" for repository in repositories]
    (work / "images.txt").write_text("".join(f"{name}\n" for name in names))
    (work / "config.yaml").write_text(f'- {{name: "{upstream.host}", scheme: http}}\n')
    (work / "policy.json").write_text(POLICY)
    wanted = "".join(f'    {repository}: ["{TAG}"]\n' for repository in repositories)
    sync = f'"{upstream.host}":\n  tls-verify: false\n  images:\n{wanted}'
    (work / "sync.yaml").write_text(sync)
    (work / "repositories.txt").write_text("".join(f"{name}\n" for name in repositories))

    def ours(folder: Path) -> list[str]:
        files = ["--image-path", str(folder), "--config-path", str(work / "config.yaml")]
        program = [sys.executable, "-m", "ociproxy", "load", str(work / "images.txt")]
        return [*program, *files]

    def copies(folder: Path) -> list[str]:
        for repository in repositories:
            (folder / repository).parent.mkdir(parents=True, exist_ok=True)
        # The best that it can do: layers shared on disk, several copies at once.
        copy = (
            f"skopeo --policy {work}/policy.json copy -q --src-tls-verify=false "
            f"--dest-shared-blob-dir {folder}/blobs "
            f'docker://{upstream.host}/"$1":{TAG} oci:{folder}/"$1":{TAG}'
        )
        each = f"xargs -P{PARALLEL} -I@ sh -c '{copy}' - @ < {work}/repositories.txt"
        return ["sh", "-c", each]

    def synchronised(folder: Path) -> list[str]:
        program = [find("skopeo"), "--policy", f"{work}/policy.json", "sync"]
        return [*program, "--src", "yaml", "--dest", "dir", f"{work}/sync.yaml", str(folder)]

    return [
        Rival(OURS, ours),
        Rival(f"skopeo copy, {PARALLEL} at once", copies),
        Rival("skopeo sync", synchronised),
    ]


def measure(rival: Rival, work: Path, upstream: Upstream) -> Round:
    folder = Path(mkdtemp(prefix="store-", dir=work))
    mark = upstream.mark()
    try:
        begun = time.perf_counter()
        done = subprocess.run(
            rival.command(folder), capture_output=True, timeout=LIMIT, check=False
        )
        seconds = time.perf_counter() - begun
        if done.returncode != 0:
            raise BenchError(f"{rival.name}: {done.stderr[-300:].decode(errors='replace')}")
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{rival.name}: not done within {LIMIT:.0f} s") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The log line of a request is written when it has ended.
    time.sleep(0.3)
    return Round(seconds, upstream.blob_bytes(mark))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the stores go (default: the system's)")
    options = parser.parse_args(arguments)
    work = Path(mkdtemp(prefix="ociproxy-bench-", dir=options.dir))
    rounds: dict[str, list[Round]] = {}
    try:
        with contextlib.ExitStack() as stack:
            (work / "upstream").mkdir()
            upstream = start_upstream(work / "upstream")
            stack.callback(upstream.process.stop)
            family = push_family(upstream.target, options.images)
            os.sync()
            for _ in range(options.rounds):
                for rival in rivals(work, upstream, family.repositories):
                    rounds.setdefault(rival.name, []).append(measure(rival, work, upstream))
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.stdout.write(table(rounds, options.images, family.size))
    return 0


def table(rounds: dict[str, list[Round]], images: int, size: int) -> str:
    """Times to ours and to the target; bytes to those of all different blobs."""
    times = {
        name: statistics.median(each.seconds for each in done) for name, done in rounds.items()
    }
    lines = [f"{images} images, {size / 1e6:.1f} MB in different blobs", ""]
    lines.append(f"{'':28}{'s':>8}{'x ours':>8}{'upstream bytes / unique':>26}")
    for name, done in rounds.items():
        most = max(each.upstream_bytes for each in done)
        ratio = times[name] / times[OURS]
        lines.append(f"{name:28}{times[name]:8.2f}{ratio:8.2f}{most / size:26.2f}")
    fastest = min(value for name, value in times.items() if name != OURS)
    met = "met" if times[OURS] <= fastest else "NOT MET"
    lines += ["", f"target: not slower than the fastest: {times[OURS] / fastest:.2f} x, {met}"]
    bytes_of_ours = max(each.upstream_bytes for each in rounds[OURS]) / size
    met = "met" if abs(bytes_of_ours - 1) < 0.005 else "NOT MET"
    lines.append(f"target: upstream bytes are the unique ones: {bytes_of_ours:.2f} x, {met}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
