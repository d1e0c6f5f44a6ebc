"""`load` against an upstream that does what it is told, wrong things included."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.cli.load_report import Report
from ociproxy.cli.screen import Screen
from ociproxy.errors import UpstreamRateLimited, UpstreamUnavailable
from tests.images import (
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Image,
    content,
    image,
    index,
    multi_platform,
)
from tests.load.loading import Load, lines_of
from tests.server import ROOT
from tests.upstream import FakeUpstream
from tests.upstream_faults import CHUNK, Fault, too_many_requests

QUICK = ("--pull-timeout", "300")


def test_images_are_whole_for_the_chosen_platform_only(upstream: FakeUpstream, load: Load) -> None:
    many = upstream.add("team/many", multi_platform("many", layers=2), tag="v1")
    one = upstream.add("team/one", image("one"), tag="v1")
    names = [f"{upstream.registry}/team/many:v1", f"{upstream.registry}/team/one:v1"]
    done = load.run(load.write(*names), "--platform", "linux/arm64")
    assert (done.code, done.stdout) == (0, "")
    assert load.complete() == set(names)
    assert load.tag(names[0]) == many.digest
    assert load.has(one)
    arm64 = many.manifests[1]
    assert upstream.count(f"/manifests/{arm64.digest}") == 1
    for other in (many.manifests[0], many.manifests[2]):
        assert upstream.count(other.digest) == 0
    assert f"loaded {names[0]}@{many.digest[:19]} " in done.stderr
    assert "2 loaded; " in done.stderr


def test_without_a_platform_it_is_that_of_this_machine(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/many", multi_platform("many"), tag="v1")
    done = load.run(load.write(f"{upstream.registry}/team/many:v1"), "--json")
    (event,) = done.events("loaded")
    assert event["platforms"] in (["linux/amd64"], ["linux/arm64"], ["linux/arm/v7"])


def test_all_platforms_and_a_line_of_its_own(upstream: FakeUpstream, load: Load) -> None:
    a = upstream.add("team/a", multi_platform("a"), tag="v1")
    b = upstream.add("team/b", multi_platform("b"), tag="v1")
    registry = upstream.registry
    listed = load.write(f"{registry}/team/a:v1", f"{registry}/team/b:v1 platform=linux/arm/v7")
    done = load.run(listed, "--all-platforms", "--json")
    assert done.code == 0
    assert load.has(a)
    assert not load.has(b)
    platforms = {event["reference"]: event["platforms"] for event in done.events("loaded")}
    assert platforms[f"{registry}/team/b:v1"] == ["linux/arm/v7"]
    assert len(platforms[f"{registry}/team/a:v1"]) == 3


def test_shared_blobs_and_images_are_fetched_once(upstream: FakeUpstream, load: Load) -> None:
    shared = image("same", layers=3, layer_size=300_000)
    for number in range(10):
        upstream.add(f"team/app{number}", shared, tag="v1")
    names = [f"{upstream.registry}/team/app{number}:v1" for number in range(10)]
    done = load.run(load.write(*names, *names), "--jobs", "10", "--json")
    assert done.code == 0
    (end,) = done.events("done")
    assert (end["loaded"], end["fetched"]) == (10, sum(blob.size for blob in shared.blobs))
    assert upstream.count("/blobs/", "GET") == len(shared.blobs)


def test_second_run_asks_for_tags_only(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", multi_platform("app"), tag="v1")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    assert load.run(listed, "--arch", "amd64").code == 0
    upstream.requests.clear()
    done = load.run(listed, "--arch", "amd64", "--json")
    assert [(r.method, r.path) for r in upstream.requests] == [
        ("HEAD", "/v2/team/app/manifests/v1")
    ]
    assert done.events("done")[0]["fetched"] == 0


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_an_image_is_loaded_again_from_an_upstream_that_refuses_each_head(
    upstream: FakeUpstream, load: Load, status: int
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/manifests/", Fault(status=status), method="HEAD")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    for _ in range(2):
        done = load.run(listed)
        assert done.code == 0, done.stderr
    assert load.has(app)


@pytest.mark.parametrize("status", [403, 503])
def test_an_image_is_planned_and_loaded_from_an_upstream_that_refuses_heads_of_blobs(
    upstream: FakeUpstream, load: Load, status: int
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/blobs/", Fault(status=status), method="HEAD")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    (plan,) = load.run(listed, "--plan", "--json").events("plan")
    assert plan["new"] == sum(blob.size for blob in app.blobs)
    for _ in range(2):
        done = load.run(listed)
        assert done.code == 0, done.stderr
    assert load.has(app)


def test_moved_tag_is_followed(upstream: FakeUpstream, load: Load) -> None:
    name = f"{upstream.registry}/team/app:v1"
    upstream.add("team/app", image("old"), tag="v1")
    assert load.run(load.write(name)).code == 0
    new = upstream.add("team/app", image("new"), tag="v1")
    assert load.run(load.write(name)).code == 0
    assert load.tag(name) == new.digest
    assert load.has(new)


def test_damaged_blob_is_mended_by_the_next_run(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app", layers=2), tag="v1")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    assert load.run(listed).code == 0
    damaged = load.store / "blobs" / app.layers[0].encoded
    data = bytearray(damaged.read_bytes())
    data[10] ^= 0xFF
    damaged.write_bytes(data)
    assert not load.has(app)
    assert load.run(listed).code == 0
    assert load.has(app)


def test_every_bad_line_is_named_and_nothing_is_asked(upstream: FakeUpstream, load: Load) -> None:
    first = load.write("nginx:ok", "ngi nx", "UPPER//x", name="first.txt")
    second = load.write("x@sha256:12", "nginx platform=linux", "# fine", name="second.txt")
    done = load.run(first, second, str(load.folder / "none.txt"))
    assert done.code == 2
    for place in ("first.txt:2: ", "first.txt:3: ", "second.txt:1: ", "second.txt:2: "):
        assert place in done.stderr
    assert "none.txt: cannot be read: No such file" in done.stderr
    assert "first.txt:1: " not in done.stderr
    assert upstream.requests == []
    assert not load.store.exists()


def test_standard_input_is_a_list(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="latest")
    assert load.run("-", stdin=f"{upstream.registry}/team/app\n").code == 0
    assert load.complete() == {f"{upstream.registry}/team/app:latest"}
    bad = load.run("-", stdin="a b\n")
    assert bad.code == 2
    assert "standard input:1: " in bad.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "give an IMAGELIST"),
        (["-", "--kubernetes", "-"], "- can be read only once"),
        (["-", "--platform", "linux/amd64", "--arch", "arm64"], "exclude each other"),
        (["-", "--platform", "linux"], "a platform is os/architecture"),
        (["quay.io/a/b:1"], "an image is named by a line of a list, which may be `-`"),
        (["no-list.txt"], "Error: no-list.txt: cannot be read: No such file or directory\n"),
        (["x" * 300 + ":1"], "File name too long\n"),
        (["--kubernetes", "a:1"], "Error: a:1: cannot be read: No such file or directory\n"),
        (["-", "--image-path", ""], "Invalid value for '--image-path': it is empty"),
        (["-", "--config-path", ""], "Invalid value for '--config-path': it is empty"),
    ],
)
def test_usage_errors_say_what_to_do(load: Load, args: list[str], expected: str) -> None:
    done = load.run(*args)
    assert done.code == 2
    assert expected in done.stderr


@pytest.mark.parametrize("option", [[], ["--kubernetes"]])
def test_what_names_no_image_is_said(load: Load, option: list[str]) -> None:
    done = load.run(*option, load.write("# nothing yet"))
    assert done.code == 0
    assert f"{load.folder}/images.txt: " in done.stderr
    assert "no image" in done.stderr


def test_a_kubernetes_manifest_in_the_place_of_a_list_is_one_line(load: Load) -> None:
    done = load.run(load.write("apiVersion: v1", "kind: Pod", "spec:", "  containers: []"))
    assert done.code == 2
    assert "is a Kubernetes manifest: give it with --kubernetes" in done.stderr
    assert done.stderr.count("images.txt") == 1


def test_tag_and_digest_are_a_pair(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    other = upstream.add("team/app", image("other"), tag="v2")
    good = f"{upstream.registry}/team/app:v1@{app.digest}"
    assert load.run(load.write(good)).code == 0
    assert load.tag(f"{upstream.registry}/team/app:v1") == app.digest
    bad = load.run(load.write(f"{upstream.registry}/team/app:v2@{app.digest}"))
    assert bad.code == 5
    assert app.digest in bad.stderr
    assert other.digest in bad.stderr
    assert load.tag(f"{upstream.registry}/team/app:v2") is None


def test_by_digest_alone(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    name = f"{upstream.registry}/team/app@{app.digest}"
    assert load.run(load.write(name)).code == 0
    assert load.has(app)
    assert load.complete() == {name}


def test_failures_are_a_list_that_load_accepts(upstream: FakeUpstream, load: Load) -> None:
    good = upstream.add("team/good", image("good"), tag="v1")
    registry = upstream.registry
    listed = load.write(
        f"{registry}/team/late:v1 platform=linux/arm64",
        f"{registry}/team/good:v1",
        f"{registry}/team/gone:v1",
    )
    failures = load.folder / "failed.txt"
    done = load.run(listed, "--failures", str(failures), "--all-platforms")
    assert done.code == 3
    assert load.has(good)
    assert "images.txt:1" in done.stderr
    assert "1 loaded, 2 failed" in done.stderr
    kept = sorted(line.split("#")[0].strip() for line in lines_of(failures))
    assert kept == [
        f"{registry}/team/gone:v1 platform=all",
        f"{registry}/team/late:v1 platform=linux/arm64",
    ]
    assert all("unknown to the upstream" in line for line in lines_of(failures))
    late = upstream.add("team/late", multi_platform("late"), tag="v1")
    upstream.add("team/gone", image("gone"), tag="v1")
    again = load.run(str(failures), "--failures", str(failures))
    assert again.code == 0
    assert list(lines_of(failures)) == []
    assert load.tag(f"{registry}/team/late:v1") == late.digest


def test_fail_fast_leaves_the_rest_untried(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    registry = upstream.registry
    listed = load.write(f"{registry}/none:v1", *(f"{registry}/team/app:v{n}" for n in range(1, 5)))
    failures = load.folder / "failed.txt"
    done = load.run(listed, "--fail-fast", "--jobs", "1", "--failures", str(failures))
    assert done.code == 3
    assert "1 failed, 4 not finished" in done.stderr
    assert len([line for line in lines_of(failures) if line.endswith("# not finished")]) == 4


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(status=503), 75),
        (Fault(drop=True), 75),
        (too_many_requests("3600"), 75),
        (Fault(status=403), 3),
        (Fault(status=404), 3),
    ],
)
def test_exit_code_says_whether_to_run_again(
    upstream: FakeUpstream, load: Load, fault: Fault, expected: int
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/manifests/", fault)
    listed = load.write(f"{upstream.registry}/team/app:v1")
    done = load.run(listed, *QUICK, "--json")
    assert done.code == expected
    (event,) = done.events("failed")
    assert event["transient"] is (expected == 75)


def test_dead_upstream_costs_its_time_once(
    upstream: FakeUpstream, load: Load, make_upstream: Callable[..., FakeUpstream]
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    dead = make_upstream()
    dead.stop_listening()
    load.write_config(upstream.url, dead.url)
    names = [f"{dead.registry}/team/app{number}:v1" for number in range(30)]
    began = time.monotonic()
    listed = load.write(*names, f"{upstream.registry}/team/app:v1")
    done = load.run(listed, "--jobs", "4", "--pull-timeout", "1000")
    assert done.code == 75
    assert "1 loaded, 30 failed" in done.stderr
    assert "what failed may pass: run it again" in done.stderr
    assert time.monotonic() - began < 15.0


def test_digest_known_from_another_repository_is_asked_for(
    upstream: FakeUpstream, load: Load
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    registry = upstream.registry
    assert load.run(load.write(f"{registry}/team/app:v1")).code == 0
    done = load.run(load.write(f"{registry}/team/other@{app.digest}"))
    assert done.code == 3
    assert load.complete() == {f"{registry}/team/app:v1"}


def test_list_of_the_store_is_a_list_to_load(
    upstream: FakeUpstream, load: Load, tmp_path: Path
) -> None:
    app = upstream.add("team/app", multi_platform("app"), tag="v1")
    one = upstream.add("team/one", image("one"))
    registry = upstream.registry
    names = [f"{registry}/team/app:v1", f"{registry}/team/one@{one.digest}"]
    assert load.run(load.write(*names)).code == 0
    refs = subprocess.run(
        [sys.executable, "-m", "ociproxy", "list", "--format", "refs", "--image-path", load.store],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=60,
    ).stdout
    other = Load(tmp_path / "other", upstream.url)
    assert other.run("-", stdin=refs).code == 0
    assert other.complete() == set(names)
    assert other.tag(names[0]) == app.digest


def test_permanent_failure_outweighs_a_transient_one(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/team/app/", Fault(status=503))
    listed = load.write(f"{upstream.registry}/team/app:v1", f"{upstream.registry}/team/none:v1")
    assert load.run(listed, *QUICK).code == 3


def test_wrong_bytes_are_integrity_and_never_stored(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app", layers=2), tag="v1")
    upstream.fault(f"/blobs/{app.layers[1].digest}", Fault(flip_at=5))
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 5
    assert app.layers[1].digest in done.stderr
    assert load.cached() == set()
    assert not (load.store / "blobs" / app.layers[1].encoded).exists()


def test_bytes_damaged_once_on_their_way_are_fetched_again(
    upstream: FakeUpstream, load: Load
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    upstream.fault(f"/blobs/{app.layers[0].digest}", Fault(flip_at=5), times=1)
    assert load.run(load.write(f"{upstream.registry}/team/app:v1")).code == 0
    assert load.has(app)


def test_throttling_is_waited_out(upstream: FakeUpstream, load: Load) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/blobs/", too_many_requests("1"), times=1)
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 0
    assert "waiting 1 s" in done.stderr
    assert load.has(app)


def test_broken_connections_are_resumed_past_any_number_of_tries(
    upstream: FakeUpstream, load: Load
) -> None:
    app = upstream.add("team/app", image("app", layer_size=3_000_000), tag="v1")
    upstream.fault(f"/blobs/{app.layers[0].digest}", Fault(cut_after=100_000))
    assert load.run(load.write(f"{upstream.registry}/team/app:v1")).code == 0
    assert load.has(app)
    blob = app.layers[0]
    in_flight = upstream.count(blob.digest) * CHUNK
    assert upstream.bytes_sent(blob.digest) < 1.1 * blob.size + in_flight


def test_index_without_the_platform_names_those_it_has(upstream: FakeUpstream, load: Load) -> None:
    """In the words of `ready`, and without what can be no platform: an attestation's."""
    platforms = ("linux/arm64/v8", "linux/amd64", "unknown/unknown")
    upstream.add("team/app", multi_platform("app", platforms=platforms), tag="v1")
    for wanted in ("linux/s390x", "unknown/unknown"):
        done = load.run(load.write(f"{upstream.registry}/team/app:v1"), "--platform", wanted)
        assert done.code == 3
        assert f"lacks {wanted}; it has linux/amd64, linux/arm64\n" in done.stderr


def test_lacking_platform_fails_only_where_the_line_asks_for_it(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", index({"linux/amd64": image("app")}), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    both = "--platform=linux/amd64", "--platform=linux/arm64"
    done = load.run(load.write(name), *both)
    assert done.code == 0
    assert "lacks linux/arm64" in done.stderr
    assert load.run(load.write(f"{name} platform=linux/amd64,linux/arm64")).code == 3


def test_index_in_an_index(upstream: FakeUpstream, load: Load) -> None:
    inner = multi_platform("inner", platforms=["linux/amd64", "linux/arm64"])
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner.top.descriptor()]}
    outer = content(json.dumps(document).encode(), OCI_INDEX)
    upstream.add("team/app", inner)
    upstream.add_content("team/app", outer)
    done = load.run(
        load.write(f"{upstream.registry}/team/app@{outer.digest}"), "--arch", "arm64", "--json"
    )
    assert done.code == 0
    arm64 = inner.manifests[1].json()
    assert all(load.blob_is_right(layer["digest"]) for layer in arm64["layers"])
    assert upstream.count(inner.manifests[0].digest) == 0


def test_full_or_unusable_store_ends_everything(
    upstream: FakeUpstream, load: Load, tmp_path: Path
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    load.store.write_text("a file")
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 4
    assert upstream.requests == []


def test_offline_configuration_is_refused(upstream: FakeUpstream, load: Load) -> None:
    load.write_config(upstream.url, serve={"offline": True})
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 2
    assert "serve.offline" in done.stderr


def test_single_image_for_another_platform(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app", platform="linux/arm64"), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    strict = load.run(load.write(f"{name} platform=linux/s390x"))
    assert strict.code == 3
    assert "lacks linux/s390x; it is for linux/arm64" in strict.stderr
    assert load.cached() == set()
    taken = load.run(load.write(name), "--arch", "s390x", "--json")
    assert taken.code == 0
    (event,) = taken.events("loaded")
    assert (event["platforms"], event["lacking"]) == (["linux/arm64"], ["linux/s390x"])


def test_docker_schema_1_is_refused(upstream: FakeUpstream, load: Load) -> None:
    old = content(
        json.dumps({"schemaVersion": 1, "name": "x", "tag": "y", "signatures": []}).encode(),
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    )
    upstream.add_content("team/old", old)
    done = load.run(load.write(f"{upstream.registry}/team/old@{old.digest}"))
    assert done.code == 3
    assert "schema 1" in done.stderr


@pytest.mark.parametrize("option", ["--failures", "--lock"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_fetched(
    upstream: FakeUpstream, load: Load, tmp_path: Path, option: str
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    target = str(tmp_path / "no" / "such" / "folder.txt")
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"), option, target)
    assert done.code == 4
    assert done.stderr == f"Error: cannot write {target}: no such file or directory\n"
    assert upstream.requests == []


def test_an_image_in_no_index_lacks_all_but_its_own_platform(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    done = load.run(load.write(name), "--arch", "amd64", "--arch", "arm64")
    assert (done.code, "lacks linux/arm64" in done.stderr) == (0, True)
    done = load.run(load.write(f"{name} platform=linux/amd64,linux/arm64"))
    assert done.code == 3
    assert "lacks linux/arm64; it is for linux/amd64" in done.stderr


@pytest.mark.parametrize("encoding", ["gzip", "aws-chunked"])
def test_an_image_is_loaded_whatever_encoding_is_named(
    upstream: FakeUpstream, load: Load, encoding: str
) -> None:
    """Storage keeps the header of an upload, and repeats it with the bytes as they are."""
    app = upstream.add("team/app", image(layer_size=300_000), tag="v1")
    upstream.fault("", Fault(headers={"Content-Encoding": encoding}))
    assert load.run(load.write(f"{upstream.registry}/team/app:v1")).code == 0
    assert load.has(app)


def test_an_upstream_that_is_away_is_said_at_once_and_not_all_the_time(
    upstream: FakeUpstream, load: Load
) -> None:
    name = f"{upstream.registry}/team/app:v1"
    upstream.fault("/manifests/", Fault(drop=True))
    done = load.run(load.write(name), "--pull-timeout", "3000")
    assert done.code == 75
    waits = [line for line in done.stderr.splitlines() if line.startswith("waiting ")]
    assert len(waits) == 1
    assert f"upstream {upstream.registry}: " in waits[0]


def test_a_misspelt_registry_costs_no_minute(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    names = ["registry.invalid/team/app:v1", "registry.invalid/team/web:v1"]
    began = time.monotonic()
    done = load.run(load.write(*names, f"{upstream.registry}/team/app:v1"))
    assert time.monotonic() - began < 30  # as many seconds are for the start on a busy machine
    assert (done.code, load.complete()) == (75, {f"{upstream.registry}/team/app:v1"})
    assert done.stderr.count("name does not resolve") == 2


def test_a_long_wait_is_said_though_a_short_one_was_just_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Report(Screen(), as_json=True)
    report.waiting(UpstreamUnavailable("quay.io", "connection broken"), 0.1)
    report.waiting(UpstreamUnavailable("quay.io", "connection broken"), 0.2)
    report.waiting(UpstreamRateLimited("quay.io", "429", retry_after=55.0), 55.0)
    report.waiting(UpstreamRateLimited("quay.io", "429", retry_after=54.0), 54.0)
    said = [json.loads(line)["seconds"] for line in capsys.readouterr().out.splitlines()]
    assert said == [0.1, 55.0]


FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


def with_urls(media_type: str, url: str) -> Image:
    """An image whose second layer has this media type and may be had at this URL."""
    made = image("windows", layers=2)
    document = made.top.json()
    document["layers"][1].update(mediaType=media_type, urls=[url])
    return Image(content(json.dumps(document).encode(), OCI_MANIFEST), blobs=made.blobs)


@pytest.mark.parametrize("media_type", [OCI_LAYER, FOREIGN])
def test_a_layer_with_urls_is_loaded_from_its_registry(
    upstream: FakeUpstream, load: Load, media_type: str
) -> None:
    made = upstream.add("team/app", with_urls(media_type, f"{upstream.url}/elsewhere"), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    assert load.run(load.write(name)).code == 0
    assert load.has(made)
    assert load.complete() == {name}
    assert upstream.count("/elsewhere") == 0


def test_a_foreign_layer_that_the_registry_lacks_is_named_and_the_image_not_complete(
    upstream: FakeUpstream, load: Load
) -> None:
    made = with_urls(FOREIGN, "https://elsewhere.example/layer")
    layer = made.blobs[2]
    made = upstream.add("team/app", Image(made.top, blobs=made.blobs[:2]), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    done = load.run(load.write(name), "--lock", str(load.folder / "lock"))
    assert done.code == 3
    assert (
        f"non-distributable layer {layer.digest}: unknown to the upstream; it may be at https://els"
        in done.stderr
    )
    assert load.complete() == set()
    assert load.tag(name) == made.digest
    assert load.has(made)
    [locked] = json.loads((load.folder / "lock").read_bytes())["images"]
    assert not locked["complete"]


def test_an_ordinary_layer_that_the_registry_lacks_fails_its_image(
    upstream: FakeUpstream, load: Load
) -> None:
    made = with_urls(OCI_LAYER, "https://elsewhere.example/layer")
    upstream.add("team/app", Image(made.top, blobs=made.blobs[:2]), tag="v1")
    assert load.run(load.write(f"{upstream.registry}/team/app:v1")).code == 3
    assert load.tag(f"{upstream.registry}/team/app:v1") is None


def test_one_of_two_windows_versions_is_loaded_by_its_version(
    upstream: FakeUpstream, load: Load
) -> None:
    older, newer = image("2019"), image("2022")
    versions = {"10.0.17763.5820": older, "10.0.20348.2461": newer}
    children = [
        each.top.descriptor(
            platform={"os": "windows", "architecture": "amd64", "os.version": version}
        )
        for version, each in versions.items()
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}
    top = content(json.dumps(document).encode(), OCI_INDEX)
    upstream.add(
        "team/app", Image(top, (older.top, newer.top), (*older.blobs, *newer.blobs)), tag="v1"
    )
    name = f"{upstream.registry}/team/app:v1"
    lock = str(load.folder / "lock")
    assert (
        load.run(load.write(f"{name} platform=windows/amd64:10.0.20348"), "--lock", lock).code == 0
    )
    assert load.has(newer)
    assert not load.has(older)
    shutil.rmtree(load.store)
    assert load.run("--lock", lock, "--locked").code == 0
    assert load.has(newer)
    assert not load.has(older)
    assert load.run(load.write(name), "--platform", "windows/amd64:10.0.14393").code == 3
