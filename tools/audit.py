"""`make audit`: the pinned dependencies, looked up among known vulnerabilities.

An index that tells of no vulnerabilities looks like one that knows of none: that is said, and the
exit code is 0, for a release is also made where only such an index can be reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from tools.release import CHECKOUT, LOCKED, program

AUDIT_LIMIT: Final = 300
"""Seconds for all look-ups."""


def report(found: Sequence[dict[str, Any]]) -> int:
    """Prints what pip-audit found; 1 where a dependency has a known vulnerability, else 0."""
    flawed = False
    for each in found:
        for flaw in each.get("vulns", []):
            flawed = True
            mended = ", ".join(flaw["fix_versions"]) or "no version yet"
            print(f"{each['name']} {each['version']}: {flaw['id']}, mended by {mended}")
    left_out = sum("skip_reason" in each for each in found)
    if left_out:
        print(f"NOT AUDITED: the index says nothing about {left_out} of {len(found)} dependencies")
    elif not flawed:
        print(f"no known vulnerability in {len(found)} dependencies")
    return int(flawed)


def main() -> int:
    options = ("--disable-pip", "--require-hashes", "--format=json", "--progress-spinner=off")
    done = subprocess.run(
        [program("pip-audit"), *options, "-r", LOCKED],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=AUDIT_LIMIT,
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = (done.stderr.strip() or "no answer").splitlines()[-1]
        print(f"NOT AUDITED: {last}")
        return 0
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
