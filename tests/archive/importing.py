"""`ociproxy import` as people run it: a process, a store, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from ociproxy.archive.lock import read_lock
from ociproxy.cli.main import main
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests import forked
from tests.images import Image
from tests.server import ROOT

LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended."""

    code: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def statuses(self) -> dict[str, str]:
        """By reference."""
        return {e["reference"]: e["status"] for e in self.events if e["event"] == "image"}

    @property
    def problems(self) -> list[str]:
        """Of all images, and of all sources."""
        images = [p for e in self.events if e["event"] == "image" for p in e["problems"]]
        return images + [e["reason"] for e in self.events if e["event"] == "failed"]


class Import:
    """Runs share a store in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"

    def command(self, *args: str | Path) -> list[str]:
        program = [sys.executable, "-m", "ociproxy", "import", "--image-path", str(self.store)]
        return [*program, *map(str, args)]

    def run(self, *args: str | Path, stdin: Path | None = None) -> Done:
        """With --json, in this process where it needs no standard input of its own."""
        if stdin is None:
            words = ["import", "--image-path", str(self.store), "--json", *map(str, args)]
            result = CliRunner(catch_exceptions=False).invoke(main, words)
            return Done(result.exit_code, _events(result.stdout), result.stderr)
        with stdin.open("rb") as source:
            done = forked.run(
                self.command("--json", *args),
                stdin=source,
                capture_output=True,
                cwd=ROOT,
                timeout=LIMIT,
                check=False,
            )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Done(done.returncode, _events(done.stdout.decode()), done.stderr.decode())

    def words(self, *args: str | Path) -> tuple[int, str]:
        """The exit code and what a person reads in a pipe."""
        done = forked.run(
            self.command(*args),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=ROOT,
            timeout=LIMIT,
            check=False,
        )
        assert done.stdout == b""
        return done.returncode, done.stderr.decode()

    def export(self, path: Path) -> subprocess.CompletedProcess[bytes]:
        """Everything that is in the store by now."""
        program = [sys.executable, "-m", "ociproxy", "export", "--image-path", str(self.store)]
        done = forked.run(
            [*program, str(path)], capture_output=True, cwd=ROOT, timeout=LIMIT, check=False
        )
        if done.returncode == 0:
            read_lock(path)
        return done

    def listed(self) -> dict[str, bool]:
        """Every visible image, and whether it is complete."""
        if not self.store.exists():
            return {}
        return {str(entry.reference): entry.complete for entry in inventory(Store(self.store))}

    def blobs(self) -> set[str]:
        return {path.name for path in (self.store / "blobs").iterdir()}

    def check(self, name: str, image: Image, *, without: Iterable[str] = ()) -> None:
        """The image is there byte for byte, under its name; `without` are absent digests."""
        store, reference = Store(self.store), Reference.parse(name)
        if reference.tag is not None:
            record = store.refs.find_tag(reference.repository, reference.tag)
            assert record is not None, name
            assert str(record.descriptor.digest) == image.digest
            assert record.descriptor.media_type == image.top.media_type
        for each in image.all_manifests():
            if each.digest in without:
                continue
            digest = Digest.parse(each.digest)
            assert store.refs.find_manifest(reference.repository, digest) is not None
            found = store.manifests.find(digest)
            assert found is not None
            assert found.raw == each.data
        for each in image.blobs:
            if each.digest not in without:
                assert store.blobs.path(Digest.parse(each.digest)).read_bytes() == each.data
        left = [path.name for path in store.staging.root.iterdir()]
        assert not left, left


def _events(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]
