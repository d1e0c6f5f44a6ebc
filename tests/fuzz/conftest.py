"""Fuzzing: few inputs in `make test`, more than 10^5 in `make fuzz`, which says how many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TRIED: Counter[str] = Counter()
"""Inputs by property; each property counts its own."""

settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=12_000,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def is_fuzzing() -> bool:
    return settings.get_current_profile_name() == "fuzz"


def inputs(fuzzing: int, testing: int = 50) -> settings:
    """How many a property gets whose inputs are dear, in `make fuzz` and in `make test`."""
    return settings(max_examples=fuzzing if is_fuzzing() else testing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_fuzzing():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED and is_fuzzing():
        for name, count in sorted(TRIED.items()):
            terminalreporter.write_line(f"fuzz: {count:8d} {name}")
        terminalreporter.write_line(f"fuzz: {sum(TRIED.values()):8d} inputs altogether")
