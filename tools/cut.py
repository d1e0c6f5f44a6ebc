"""`make cut VERSION=1.2.3`: the unreleased changes become a version, dated today.

The version stands in ociproxy/__init__.py; what else has it is made from there by `make chart`.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path
from typing import Final

from ociproxy import __version__

CHECKOUT: Final = Path(__file__).parent.parent
UNRELEASED: Final = "## [Unreleased]\n"


def cut(changelog: str, version: str, day: str) -> str:
    """The change log with an empty part for what comes next. Raises ValueError."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", version):
        raise ValueError(f"{version!r} is not a version such as 1.2.3 or 1.2.3rc1")
    if f"## [{version}]" in changelog:
        raise ValueError(f"CHANGELOG.md has {version} already")
    before, heading, after = changelog.partition(UNRELEASED)
    if not heading:
        raise ValueError("CHANGELOG.md has no part `## [Unreleased]`")
    changes = after.partition("\n## [")[0].strip()
    if not changes:
        raise ValueError("CHANGELOG.md has nothing that is unreleased")
    return f"{before}{heading}\n## [{version}] - {day}\n{after}"


def main(version: str) -> None:
    path = CHECKOUT / "CHANGELOG.md"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        changelog = cut(path.read_text(encoding="utf-8"), version, day)
    except ValueError as exc:
        sys.exit(str(exc))
    path.write_text(changelog, encoding="utf-8")
    path = CHECKOUT / "ociproxy/__init__.py"
    text = path.read_text(encoding="utf-8")
    changed = text.replace(f'__version__ = "{__version__}"', f'__version__ = "{version}"')
    path.write_text(changed, encoding="utf-8")
    print(f"{version}: look at CHANGELOG.md, then commit, tag v{version} and run `make release`")


if __name__ == "__main__":
    main(sys.argv[1])
