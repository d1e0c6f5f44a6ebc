"""Fuzzing: few inputs in `make test`, more than 10^5 in `make fuzz`, which says how many."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.counting import PROFILE, TRIED, is_fuzzing

settings.register_profile(
    PROFILE,
    deadline=None,
    max_examples=9_500,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_fuzzing():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if is_fuzzing():
        for name, count in sorted(TRIED.items()):
            terminalreporter.write_line(f"fuzz: {count:8d} {name}")
        terminalreporter.write_line(f"fuzz: {sum(TRIED.values()):8d} inputs altogether")
