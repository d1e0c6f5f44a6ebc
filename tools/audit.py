"""`make audit`, with which `make release` begins: the pins, looked up among known vulnerabilities.

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
ELSEWHERE: Final = "Run `make audit` where PyPI itself answers, before this release is published."


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
        not_audited(f"the index says nothing about {left_out} of {len(found)} dependencies")
    elif not flawed:
        print(f"no known vulnerability in {len(found)} dependencies")
    return int(flawed)


def main() -> int:
    options = ("--disable-pip", "--require-hashes", "--format=json", "--progress-spinner=off")
    try:
        done = subprocess.run(
            [program("pip-audit"), *options, "-r", LOCKED],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
            timeout=AUDIT_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return not_audited(f"no answer within {AUDIT_LIMIT} s")
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return not_audited((done.stderr.strip() or "no answer").splitlines()[-1])
    return report(found)


def not_audited(reason: str) -> int:
    print(f"NOT AUDITED: {reason}.")
    print(ELSEWHERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
