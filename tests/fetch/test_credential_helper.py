"""How long a credential helper's answer is used, with helpers that really run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.config.settings import Auth, Secret
from ociproxy.errors import UpstreamDenied
from ociproxy.fetch.credential_helper import CredentialSource
from ociproxy.fetch.credentials import Credentials
from tests.clock import HandClock

MakeHelper = Callable[[str, str], None]


class Counting:
    """A helper whose secret is the number of its run: `s3cret-1`, then `s3cret-2`."""

    def __init__(self, make_helper: MakeHelper, folder: Path) -> None:
        self.runs_file, self.broken = folder / "runs", folder / "broken"
        make_helper(
            "fake",
            f"[ -e {self.broken} ] && exit 3\n"
            f"echo run >> {self.runs_file}; n=$(wc -l < {self.runs_file})\n"
            'echo "{\\"Username\\": \\"AWS\\", \\"Secret\\": \\"s3cret-$n\\"}"',
        )

    @property
    def runs(self) -> int:
        return len(self.runs_file.read_text().splitlines())


@pytest.fixture
def helper(make_helper: MakeHelper, tmp_path: Path) -> Counting:
    return Counting(make_helper, tmp_path)


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1000.0)


def expected(number: int) -> Credentials:
    return Credentials("AWS", Secret(f"s3cret-{number}"))


def test_an_answer_is_used_for_its_lifetime_and_renewed_before_that_is_over(
    helper: Counting, clock: HandClock
) -> None:
    source = CredentialSource(Auth(helper="fake", lifetime=100.0), "r", clock=clock)
    for clock.time in (1000.0, 1040.0, 1079.0):
        assert source.get() == expected(1)
    clock.time = 1081.0
    assert source.get() == expected(2)
    clock.time = 1160.0
    assert source.get() == expected(2)
    assert helper.runs == 2


def test_without_a_lifetime_the_helper_is_asked_each_time(
    helper: Counting, clock: HandClock
) -> None:
    source = CredentialSource(Auth(helper="fake", lifetime=0.0), "r", clock=clock)
    assert [source.get() for _ in range(3)] == [expected(1), expected(2), expected(3)]


def test_a_helper_that_fails_to_renew_fails_nobody_while_its_answer_is_good(
    helper: Counting, clock: HandClock
) -> None:
    source = CredentialSource(Auth(helper="fake", lifetime=100.0), "r", clock=clock)
    source.get()
    helper.broken.touch()
    for clock.time in (1081.0, 1082.0, 1099.0):
        assert source.get() == expected(1)
    clock.time = 1101.0
    with pytest.raises(UpstreamDenied, match="exit status 3"):
        source.get()
    helper.broken.unlink()
    assert source.get() == expected(2)


def test_a_refused_answer_is_replaced_once(helper: Counting, clock: HandClock) -> None:
    source = CredentialSource(Auth(helper="fake", lifetime=100.0), "r", clock=clock)
    assert source.replace(source.get()) == expected(2)
    # Sent before the others came: they are not to blame.
    assert source.replace(expected(1)) == expected(2)
    assert source.replace(expected(2)) is None
    assert helper.runs == 2
    clock.time += 11
    assert source.replace(expected(2)) == expected(3)


def test_a_password_that_is_refused_has_no_replacement() -> None:
    source = CredentialSource(Auth(user="me", password=Secret("x")), "r")
    assert source.replace(source.get()) is None


def test_many_threads_run_the_helper_once(
    make_helper: MakeHelper, tmp_path: Path, clock: HandClock
) -> None:
    log = tmp_path / "log"
    make_helper("slow", f'sleep 0.2; echo x >> {log}; echo \'{{"Username":"u","Secret":"s"}}\'')
    source = CredentialSource(Auth(helper="slow", lifetime=100.0), "r", clock=clock)

    def ask_all() -> float:
        found: list[Credentials | None] = []
        threads = [threading.Thread(target=lambda: found.append(source.get())) for _ in range(8)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [Credentials("u", Secret("s"))] * 8
        return time.monotonic() - began

    ask_all()
    assert log.read_text() == "x\n"
    clock.time += 90
    ask_all()
    assert log.read_text() == "x\nx\n"
