"""`make docs`: the documentation as a site, in site/; each link is checked.

The documents keep their places, so that their links hold in the repository and on the site. What
they link to that is no document, such as a value file of the chart, is on the site as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parent.parent
SOURCES: Final = CHECKOUT / "build/site"
PARTS: Final = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "deploy")
BUILD_LIMIT: Final = 300


def collect(folder: Path) -> None:
    """What the site is made of, in the places of the checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in PARTS:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, folder / name)
        else:
            shutil.copy(path, folder)
    (folder / "bench").mkdir()
    shutil.copy(CHECKOUT / "bench/README.md", folder / "bench")


def main() -> int:
    collect(SOURCES)
    # A link that leads nowhere is a warning, and `--strict` makes warnings errors.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    config = CHECKOUT / "tools/mkdocs.yml"
    done = subprocess.run(
        [*command, "--config-file", config],
        cwd=CHECKOUT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
        timeout=BUILD_LIMIT,
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
