"""The file of an archive: whole under its name, though other exports write there."""

from __future__ import annotations

from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from ociproxy.archive.export.output import open_output, staged
from ociproxy.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 * 1024
WRITERS = 4
COMMITS = 40


def test_many_exports_to_one_name_leave_whole_files(tmp_path: Path) -> None:
    """One may open the staged file just before another one gives it its name."""
    path = tmp_path / "archive.tar"
    over = Event()
    seen: list[bytes] = []
    committed: list[int] = []

    def write(number: int) -> None:
        count = 0
        while count < COMMITS and not over.is_set():
            try:
                with open_output(path) as output:
                    output.write(bytes([number]) * SIZE)
                    output.finish()
                    output.commit()
            except OutputError as exc:
                if exc.reason != "another export writes it now":
                    raise
                continue
            count += 1
        committed.append(count)
        over.set()

    def read() -> None:
        while not over.is_set():
            if path.exists():
                seen.append(path.read_bytes())

    threads = [Thread(target=write, args=(number,)) for number in range(1, WRITERS + 1)]
    threads.append(Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(committed) >= COMMITS
    assert seen
    whole = {bytes([number]) * SIZE for number in range(1, WRITERS + 1)}
    assert [len(each) for each in seen if each not in whole] == []
    assert not staged(path).exists()


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar"
    staged(path).write_bytes(b"half of an archive")
    with open_output(path) as output:
        output.write(b"whole")
        output.finish()
        output.commit()
    assert path.read_bytes() == b"whole"


def test_a_second_export_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar"
    with open_output(path) as output:
        output.write(b"first")
        with (
            pytest.raises(OutputError, match="another export writes it now"),
            open_output(path),
        ):
            pass
        output.finish()
        output.commit()
    assert path.read_bytes() == b"first"
