"""Whether a store may be believed after a kill or a power cut: looked at as bare files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ociproxy.store.files import is_sealed
from tests.images import Image


def faults_of(store: Path, promised: Iterable[Image] = ()) -> list[str]:
    """What is wrong: bytes that would be believed, records before their manifests, and what the
    `promised` images lack."""
    found = [
        f"believed, with wrong bytes: {path.name}"
        for path in files_of(store / "blobs")
        if is_sealed(path.stat(), path.name) and not is_right(path)
    ]
    found += [
        f"a record before its manifest: {path.relative_to(store)}"
        for path in (*files_of(store / "refs"), *files_of(store / "referrers"))
        if not is_right(manifest_of(store, path))
    ]
    for image in promised:
        found += [
            f"promised, and not there: {content.digest}"
            for content in image.all_content()
            if not any(is_right(store / each / content.encoded) for each in ("fat", "img", "blobs"))
        ]
    return found


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def is_right(path: Path) -> bool:
    """Whether the bytes are those that the file's name says."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def manifest_of(store: Path, record: Path) -> Path:
    """Where the manifest of a record is; the record itself where it cannot be read."""
    try:
        document = json.loads(record.read_bytes())
        digest = str(document.get("descriptor", document)["digest"]).partition(":")[2]
    except (ValueError, KeyError):
        return record
    path = store / "fat" / digest
    return path if path.exists() else store / "img" / digest


def left_behind(store: Path) -> list[str]:
    """What is in `pulls/`."""
    return [path.name for path in sorted((store / "pulls").iterdir())]
