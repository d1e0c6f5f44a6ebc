"""What the store holds, as the child process of the admin listener tells it."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.config.settings import Config
from ociproxy.metrics.tally import Tally
from ociproxy.serve.admin import survey
from ociproxy.serve.admin.survey import Findings, Images, Surveyor
from tests.images import image
from tests.load.loading import Load
from tests.upstream import FakeUpstream


def surveyor(*lines: str) -> Surveyor:
    """One whose child prints these lines."""
    program = f"print({chr(10).join(lines)!r})"
    return Surveyor(lambda *_: [sys.executable, "-c", program], Config(), Tally(1))


def walked(found: Surveyor) -> Findings | None:
    """What it knows after one walk that was asked for."""
    found.ask()
    found.start()
    while found.is_looking:
        time.sleep(0.01)
    found.close()
    return found.contents


def test_bytes_by_kind_and_images_with_what_they_share(load: Load, upstream: FakeUpstream) -> None:
    one, two = image("one", layers=2), image("one", annotations={"a": "b"})
    upstream.add("app", one, tag="1")
    upstream.add("app", two, tag="2")
    load.run(load.write(f"{upstream.registry}/app:1", f"{upstream.registry}/app:2"))
    result = CliRunner().invoke(
        main, ["survey", "--json", "--images", "--image-path", str(load.store)]
    )
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = {each["kind"]: each for each in events if each["event"] == "kind"}
    assert kinds["manifest"]["objects"] == 2
    assert kinds["manifest"]["bytes"] == one.top.size + two.top.size
    blobs = {blob.digest: blob.size for each in (one, two) for blob in each.blobs}
    assert (kinds["blob"]["objects"], kinds["blob"]["bytes"]) == (len(blobs), sum(blobs.values()))
    images = [each for each in events if each["event"] == "image"]
    assert [each["reference"].rpartition("/")[2] for each in images] == ["app:1", "app:2"]
    (layer,) = two.layers
    assert images[0]["shared"] == layer.size
    assert events[-1] == {"event": "end"}


def test_images_are_kept_up_to_so_many_bytes_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(survey, "KEPT", 10_000)
    lines = [
        json.dumps({"event": "image", "reference": f"Name-{n}", "platforms": "x" * 1000})
        for n in range(20)
    ]
    found = walked(surveyor(*lines, '{"event": "end"}'))
    assert found is not None
    assert found.images is not None
    assert (len(found.images), found.left_out) == (8, 12)
    assert found.images.size <= 10_000
    assert [found.images[each]["reference"] for each in found.images.matching("NAME-7")] == [
        "Name-7"
    ]


def test_the_bytes_of_images_are_those_of_memory() -> None:
    tracemalloc.start()
    try:
        images = Images()
        for number in range(3000):
            line = json.dumps({"reference": f"registry.example/app-{number}:1", "size": number})
            assert images.add(f"registry.example/app-{number}:1", line.encode())
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * used < images.size < 1.5 * used


def test_a_walk_that_ends_too_soon_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert walked(surveyor('{"event": "error", "reason": "no such folder"}')) is None
    assert 'survey failed reason="no such folder"' in capfd.readouterr().err


def test_a_line_that_is_too_long_is_left_out() -> None:
    long = json.dumps({"event": "image", "reference": "x" * 100_000})
    found = walked(surveyor(long, '{"event": "image", "reference": "y"}', '{"event": "end"}'))
    assert found is not None
    assert found.images is not None
    assert (len(found.images), found.images[0]) == (1, {"event": "image", "reference": "y"})


def test_images_that_are_asked_for_during_a_walk_without_them_are_looked_for_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(survey, "_FIRST", 0.0)
    looked = Event()

    def make(store: Path, config: Config, words: Sequence[str]) -> list[str]:
        if "--images" in words:
            looked.set()
        else:
            found.ask()
        return [sys.executable, "-c", ""]

    found = Surveyor(make, Config(), Tally(1))
    found.start()
    assert looked.wait(10)
    found.close()
