"""The table of docs/operations.md: what a client gets while the store's disk fails."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.store.store import Store
from tests.disk.disk import Disk, faulty_disk
from tests.disk.faults import FAULTS
from tests.images import Image, image
from tests.serve.scene import Scene
from tests.server import ROOT
from tests.stores import put

CASES = ("stored blob", "stored tag", "other blob", "other tag", "`load`", "`import`")
HEAD = f"| Fault | {' | '.join(CASES)} |"
ANSWER_LIMIT = 20.0
LAYER = 200_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with faulty_disk(tmp_path / "faulty") as made:
        yield made


def documented() -> dict[str, tuple[str, ...]]:
    """The rows, by fault."""
    lines = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[lines.index(HEAD) + 2 :]]
    end = next(index for index, row in enumerate(rows) if len(row) == 1)
    return {fault: tuple(outcomes) for fault, *outcomes in rows[:end]}


class Case:
    """One fault: images that the store has, and others that only the upstream has."""

    def __init__(self, scene: Scene, store: Path, name: str) -> None:
        self.scene, self.store, self.name = scene, store, name
        self.registry = scene.upstream.registry
        self.here, self.there = self.image("here"), self.image("there")
        reference = f"{self.registry}/{scene.repository}:{self.tag('here')}"
        put(Store(store), reference, self.here, resolved=time.time())

    def tag(self, which: str) -> str:
        return f"{self.name.replace(' ', '-')}-{which}"

    def image(self, which: str) -> Image:
        tag = self.tag(which)
        return self.scene.upstream.add("app", image(tag, layer_size=LAYER), tag=tag)

    def blob(self, made: Image) -> str:
        layer = made.layers[0]
        return self.outcome(lambda: self.scene.get(layer).body == layer.data, layer.digest)

    def manifest(self, made: Image, which: str) -> str:
        tag = self.tag(which)
        return self.outcome(lambda: self.scene.manifest(tag).body == made.top.data, tag)

    def outcome(self, ask: Callable[[], bool], name: str) -> str:
        """Where the right bytes came from."""
        before = self.scene.upstream.count(name, "GET")
        assert ask(), "the client got something else"
        return "upstream" if self.scene.upstream.count(name, "GET") > before else "store"

    def load(self) -> str:
        listed = self.store.parent.parent / "images.txt"
        listed.write_text(f"{self.registry}/app:{self.tag('there')}\n")
        return self.command(
            "load", str(listed), "--config-path", str(self.scene.server.config_path)
        )

    def command(self, *words: str) -> str:
        done = CliRunner().invoke(main, [*words, "--image-path", str(self.store)])
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert (done.exit_code == 0) or done.output.startswith("Error: "), done.output
        return f"exit {done.exit_code}"


def within_limit(ask: Callable[[], str]) -> str:
    began = time.monotonic()
    found = ask()
    assert time.monotonic() - began < ANSWER_LIMIT
    return found


def test_each_outcome_of_a_failing_disk_is_documented(
    scene: Scene, disk: Disk, tmp_path: Path
) -> None:
    store, archive = disk.root / "store", tmp_path / "archive.tar"
    server = scene.start(store=store)
    cases = {name: Case(scene, store, name) for name in FAULTS}
    assert cases["ENOSPC"].command("export", str(archive)) == "exit 0"
    found = {}
    for fault, case in cases.items():
        disk.fail(fault)
        asked: tuple[Callable[[], str], ...] = (
            lambda: case.blob(case.here),  # noqa: B023 called at once
            lambda: case.manifest(case.here, "here"),  # noqa: B023 the same
            lambda: case.blob(case.there),  # noqa: B023 the same
            lambda: case.manifest(case.there, "there"),  # noqa: B023 the same
            case.load,
            lambda: case.command("import", str(archive)),  # noqa: B023 the same
        )
        found[fault] = tuple(within_limit(ask) for ask in asked)
        assert server.get("/healthz").status == 200
        disk.heal()
        # Without a restart the store keeps what comes again, and gives what it has.
        assert case.manifest(case.there, "there") in ("store", "upstream")
        assert case.blob(case.there) in ("store", "upstream")
        for blob in case.there.blobs:
            server.wait_for_file(f"blobs/{blob.encoded}")
        assert case.blob(case.here) == case.manifest(case.here, "here") == "store"
        assert case.blob(case.there) == case.manifest(case.there, "there") == "store"
        assert server.get("/readyz").status == 200
    assert cases["ENOSPC"].load() == cases["ENOSPC"].command("import", str(archive)) == "exit 0"
    assert not re.search(r"Traceback|status=50", server.log())
    table = "\n".join(f"| {fault} | {' | '.join(row)} |" for fault, row in found.items())
    assert documented() == found, f"the table is\n{HEAD}\n{table}"


def test_a_disk_that_fails_at_any_step_of_a_pull_harms_no_client(scene: Scene, disk: Disk) -> None:
    server = scene.start(store=disk.root / "store", background_fills=1)
    for fault in ("ENOSPC", "EIO on write"):
        for step in range(0, 200, 2):
            tag = f"{fault.replace(' ', '-')}-{step}"
            pulled = scene.upstream.add("app", image(tag, layer_size=LAYER), tag=tag)
            disk.fail(fault, after=step)
            assert scene.manifest(tag).body == pulled.top.data
            for blob in pulled.blobs:
                assert scene.get(blob).body == blob.data
            steps = disk.steps()
            disk.heal()
            if steps < step:
                break
        else:
            raise AssertionError("a pull has more steps than were tried")
    assert not re.search(r"Traceback|status=50", server.log())
    done = CliRunner().invoke(main, ["check", "--image-path", str(server.store), "--json"])
    assert done.exit_code in (0, 3), done.output
