"""A short form of `make stress`: see `tests.stress`."""

from __future__ import annotations

from pathlib import Path

from tests.stress.run import Setting, run, table


def test_a_store_that_is_too_small_fails_no_client_and_loses_nothing(tmp_path: Path) -> None:
    setting = Setting(seconds=4, images=80, seed=1)
    found = run(setting, tmp_path)
    print(table(setting, found))
    assert found.wrong == []
    assert found.counts["pulls"] > 0
    assert found.counts["removed"] > 0
    assert all(found.counts[name] for name in ("load", "prune", "check"))
