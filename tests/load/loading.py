"""`ociproxy load` as people run it: a process, a store, a list."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests import forked
from tests.images import Image
from tests.server import upstream_entry

LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended."""

    code: int
    stdout: str
    stderr: str

    def events(self, name: str = "") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.stdout.splitlines()]
        return [event for event in found if name in ("", event["event"])]


class Load:
    """Runs share a store and a config file in `folder`."""

    def __init__(self, folder: Path, *upstreams: str, config: dict[str, object] | None = None):
        self.folder, self.store = folder, folder / "store"
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        self.write_config(*upstreams, **(config or {}))

    def write_config(self, *upstreams: str, **more: object) -> None:
        entries = [upstream_entry(url) for url in upstreams]
        self.config.write_text(yaml.safe_dump({"upstreams": entries, **more}))

    def write(self, *lines: str, name: str = "images.txt") -> str:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    def start(self, *args: str) -> subprocess.Popen[str]:
        return self._start(self.command(*args))

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return forked.popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, stdin: str = "") -> Done:
        return self.run_command(self.command(*args), stdin=stdin)

    def run_command(self, command: list[str], *, stdin: str = "") -> Done:
        with self._start(command) as process:
            try:
                out, err = process.communicate(stdin, LIMIT)
            finally:
                process.kill()
        assert "Traceback" not in err, err
        return Done(process.returncode, out, err)

    def command(self, *args: str) -> list[str]:
        where = ["--image-path", str(self.store), "--config-path", str(self.config)]
        return [sys.executable, "-m", "ociproxy", "load", *where, *args]

    # What the store has

    def complete(self) -> set[str]:
        """The references whose images are whole."""
        return {str(entry.reference) for entry in inventory(Store(self.store)) if entry.complete}

    def cached(self) -> set[str]:
        """All references that a reader can see."""
        return {str(entry.reference) for entry in inventory(Store(self.store))}

    def has(self, image: Image) -> bool:
        """Whether every byte of it is there, hashed."""
        store = Store(self.store)
        manifests = all(store.manifests.find(Digest.parse(m.digest)) for m in image.all_manifests())
        return manifests and all(self.blob_is_right(blob.digest) for blob in image.blobs)

    def blob_is_right(self, digest: str) -> bool:
        path = Store(self.store).blobs.path(Digest.parse(digest))
        return path.exists() and str(Digest.of(path.read_bytes())) == digest

    def tag(self, reference: str) -> str | None:
        """The digest that the store has for a tag."""
        parsed = Reference.parse(reference)
        record = Store(self.store).refs.find_tag(parsed.repository, parsed.tag or "")
        return None if record is None else str(record.descriptor.digest)


def lines_of(path: Path) -> Iterator[str]:
    """A list's lines that are not only a comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line
