"""`make release`: what a release consists of, in dist/; the same bytes for the same commit.

Wheel, sdist, a bill of materials (CycloneDX) of the dependencies that tools/requirements.txt pins,
and the checksums of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

from ociproxy import __version__

CHECKOUT: Final = Path(__file__).parent.parent
LOCKED: Final = CHECKOUT / "tools/requirements.txt"
SUMS: Final = "SHA256SUMS"
BUILD_LIMIT: Final = 600


def program(name: str) -> str:
    """Of the virtual environment that this runs in."""
    return str(Path(sys.executable).with_name(name))


def run(*command: str | Path, **more: str) -> None:
    """Ends the release where the command fails."""
    subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **more}, check=True, timeout=BUILD_LIMIT
    )


def commit_time() -> str:
    """Seconds since 1970 of the commit, unless the operator says another time. Files that were
    changed since do not change it."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def build(folder: Path) -> None:
    """The wheel is made of the sdist, so that the sdist is known to be whole."""
    # Without isolation the build needs no network: the extra `release` has what it needs.
    run(
        *(program("uv"), "build", "--quiet", "--no-build-isolation", "--python", sys.executable),
        *("--out-dir", folder),
        SOURCE_DATE_EPOCH=commit_time(),
    )


def bill_of_materials(folder: Path) -> Path:
    path = folder / f"ociproxy-{__version__}.cdx.json"
    run(
        *(program("cyclonedx-py"), "requirements", LOCKED, "--pyproject", "pyproject.toml"),
        *("--mc-type", "application", "--output-reproducible", "--of", "JSON", "-o", path),
        PYTHONWARNINGS="ignore",
    )
    bill: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # What the tool cannot know: the version is no text in pyproject.toml, and a list of pins does
    # not tell what is needed by what.
    root = bill["metadata"]["component"]
    root |= {"version": __version__, "purl": f"pkg:pypi/ociproxy@{__version__}"}
    named = {each["name"]: each["bom-ref"] for each in bill["components"]}
    bill["dependencies"] = [
        {"ref": root["bom-ref"], "dependsOn": sorted(named[name] for name in direct())},
        *({"ref": reference} for reference in sorted(named.values())),
    ]
    for each in bill["components"]:
        del each["description"]  # the line of the list, with all digests once more
    path.write_text(json.dumps(bill, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def direct() -> list[str]:
    """The dependencies that we name, without those that they bring, as the index spells them."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    needed = tomllib.loads(text)["project"]["dependencies"]
    return [re.split(r"[<>=!~ ;\[]", each)[0].lower() for each in needed]


def checksums(folder: Path) -> None:
    """In the form that `sha256sum --check` reads."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.glob(f"ociproxy-{__version__}*"))
    ]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("ociproxy-*"):
        old.unlink()
    build(folder)
    bill_of_materials(folder)
    checksums(folder)
    print((folder / SUMS).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "dist")
