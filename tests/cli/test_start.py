"""How a command starts: what its user waits for before it begins to work."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from ociproxy.cli.main import main

_CODE = """
import gc, sys
from ociproxy.__main__ import main

sys.argv = ["ociproxy", *sys.argv[1:]]
try:
    main()
except SystemExit:
    print("collects" if gc.isenabled() else "does not collect", gc.get_freeze_count() > 1000)
"""


def test_no_garbage_is_looked_for_among_what_was_imported_but_later_there_is() -> None:
    program = [sys.executable, "-c", _CODE, "diff", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "collects True"


def test_an_option_before_the_command_is_answered_with_where_it_stands() -> None:
    done = CliRunner().invoke(main, ["--image-path", "/srv", "list"])
    assert done.exit_code == 2
    assert "behind the command: ociproxy COMMAND --image-path" in done.output
