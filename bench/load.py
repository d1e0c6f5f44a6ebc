"""Loading: images with shared layers into a store, against skopeo and ociregistry.

The upstream is a real docker-registry; its own access log counts the bytes. Rounds go over all
rivals before the next one begins; times are medians.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from bench.images import TAG, Family, push_family
from bench.processes import CHECKOUT, BenchError, environment
from bench.results import Plan, Results
from bench.servers import OCIPROXY, OCIREGISTRY, Upstream, find

LIMIT = 300.0
PARALLEL = 4
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'
SKOPEO_COPY = f"skopeo copy, {PARALLEL} at once"
SKOPEO_SYNC = "skopeo sync"


@dataclass(frozen=True)
class Rival:
    """`command` gets an empty folder, and says what to run."""

    name: str
    command: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Round:
    seconds: float
    cpu_seconds: float
    upstream_bytes: int


def rivals(work: Path, upstream: Upstream, repositories: list[str]) -> list[Rival]:
    names = [f"{upstream.host}/{repository}:{TAG}" for repository in repositories]
    (work / "images.txt").write_text("".join(f"{name}\n" for name in names))
    (work / "config.yaml").write_text(f'- {{name: "{upstream.host}", scheme: http}}\n')
    (work / "policy.json").write_text(POLICY)
    registry = f'registries: [{{name: "{upstream.host}", scheme: http}}]\n'
    (work / "ociregistry.yaml").write_text(registry)
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

    def ociregistry(folder: Path) -> list[str]:
        settings = ["--config-file", str(work / "ociregistry.yaml"), "--image-path", str(folder)]
        return [find(OCIREGISTRY), *settings, "load", "--image-file", str(work / "images.txt")]

    return [
        Rival(OCIPROXY, ours),
        Rival(OCIREGISTRY, ociregistry),
        Rival(SKOPEO_COPY, copies),
        Rival(SKOPEO_SYNC, synchronised),
    ]


def measure(rival: Rival, work: Path, upstream: Upstream) -> Round:
    folder = Path(mkdtemp(prefix="store-", dir=work))
    mark = upstream.mark()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        begun = time.perf_counter()
        done = subprocess.run(
            rival.command(folder),
            cwd=CHECKOUT,
            env=environment(),
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        seconds = time.perf_counter() - begun
        if done.returncode != 0:
            raise BenchError(f"{rival.name}: {done.stderr[-300:].decode(errors='replace')}")
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{rival.name}: not done within {LIMIT:.0f} s") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # The log line of a request is written when it has ended.
    time.sleep(0.3)
    return Round(seconds, cpu, upstream.blob_bytes(mark))


def loading(work: Path, upstream: Upstream, plan: Plan, results: Results) -> None:
    """Of the same images a few, and then more. Upstream bytes are to those of all different blobs,
    in the worst round."""
    family = push_family(upstream.target, max(plan.load_images))
    os.sync()
    for count in plan.load_images:
        _loading(work, upstream, family.first(count), plan, results)


def _loading(work: Path, upstream: Upstream, family: Family, plan: Plan, results: Results) -> None:
    rounds: dict[str, list[Round]] = defaultdict(list)
    failures: set[str] = set()
    for _ in range(plan.load_rounds):
        for rival in rivals(work, upstream, family.repositories):
            try:
                rounds[rival.name].append(measure(rival, work, upstream))
            except BenchError as error:
                failures.add(str(error))
    count = len(family.repositories)
    for name, done in rounds.items():
        if done:
            results.put(f"load_{count}", name, statistics.median(each.seconds for each in done))
            cpu = statistics.median(each.cpu_seconds for each in done)
            results.put(f"load_{count}_cpu", name, cpu)
            most = max(each.upstream_bytes for each in done)
            results.put(f"load_{count}_upstream", name, most / family.size)
    for failure in sorted(failures):
        results.note(f"load of {count}: {failure}")
    results.note(f"load of {count}: {family.size / 1e6:.1f} MB in different blobs")
