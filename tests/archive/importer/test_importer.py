"""Import of OCI layouts: names, order, what is there already, what is broken."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests import images, layouts
from tests.archive.importing import Import
from tests.parts.tools import read_only, require_root, run
from tests.server import ROOT, Mirror

IMAGE = images.image("import", layers=2, layer_size=300_000)
MULTI = images.multi_platform("import")
BOTH = {"quay.io/team/one:1": IMAGE, "docker.io/library/two:2": MULTI}
DOCKER = {"registry.k8s.io/three:3": images.multi_platform("three", docker=True)}
NAME = "quay.io/team/one:1"


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return layouts.write_tar(tmp_path / "x.tar", layouts.members(BOTH | DOCKER))


def test_everything_in_a_tar_is_imported(job: Import, archive: Path) -> None:
    done = job.run(archive)
    assert done.code == 0
    assert done.statuses == dict.fromkeys(BOTH | DOCKER, "imported")
    for name, image in (BOTH | DOCKER).items():
        job.check(name, image)


def test_a_folder_is_as_good_as_a_tar(job: Import, tmp_path: Path) -> None:
    folder = layouts.write_folder(tmp_path / "layout", layouts.members(BOTH))
    assert job.run(folder).code == 0
    for name, image in BOTH.items():
        job.check(name, image)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_tar_is_known_by_its_content(
    job: Import, archive: Path, pack: Callable[[bytes], bytes]
) -> None:
    archive.write_bytes(pack(archive.read_bytes()))
    assert job.run(archive).code == 0
    job.check(NAME, IMAGE)


def test_standard_input_is_read_once(job: Import, archive: Path) -> None:
    assert job.run("-", stdin=archive).code == 0
    job.check(NAME, IMAGE)


def test_the_order_of_the_members_does_not_matter(job: Import, tmp_path: Path) -> None:
    files = list(layouts.members(BOTH))
    random.Random(4).shuffle(files)
    assert job.run(layouts.write_tar(tmp_path / "x.tar", files)).code == 0
    assert job.listed() == dict.fromkeys(BOTH, True)
    for name, image in BOTH.items():
        job.check(name, image)


def test_sha512_content_is_imported(job: Import, tmp_path: Path) -> None:
    blob = images.random_blob(50_000, algorithm="sha512")
    config = images.content(b'{"os":"linux","architecture":"amd64"}', images.OCI_CONFIG)
    manifest = images._json(
        {"schemaVersion": 2, "config": config.descriptor(), "layers": [blob.descriptor()]},
        images.OCI_MANIFEST,
    )
    image = images.Image(manifest, blobs=(config, blob))
    assert job.run(layouts.write_tar(tmp_path / "x", layouts.members({NAME: image}))).code == 0
    job.check(NAME, image)


@pytest.mark.parametrize(
    "media_type",
    [
        f"{images.OCI_MANIFEST}; charset=utf-8",
        images.OCI_MANIFEST.replace("vnd.oci", "VND.OCI"),
        "application/octet-stream",
        "text/plain; charset=utf-8",
    ],
)
def test_an_image_that_is_called_carelessly_is_imported_whole(
    job: Import, tmp_path: Path, media_type: str
) -> None:
    made = {NAME: layouts.called(IMAGE, media_type)}
    assert job.run(layouts.write_tar(tmp_path / "x.tar", layouts.members(made))).code == 0
    job.check(NAME, made[NAME])
    top = IMAGE.top.descriptor(mediaType=media_type, annotations={layouts.IMAGE_NAME: f"{NAME}-b"})
    index = {"schemaVersion": 2, "manifests": [top]}
    files = dict(layouts.members({NAME: IMAGE})) | {"index.json": json.dumps(index).encode()}
    assert job.run(layouts.write_tar(tmp_path / "y.tar", files.items())).code == 0
    job.check(f"{NAME}-b", IMAGE)


def test_a_second_time_writes_nothing_anew(job: Import, archive: Path) -> None:
    job.run(archive)
    before = {p: p.stat().st_mtime_ns for d in ("blobs", "img", "fat") for p in tree(job, d)}
    done = job.run(archive)
    assert done.code == 0
    assert set(done.statuses.values()) == {"unchanged"}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def tree(job: Import, folder: str) -> list[Path]:
    return list((job.store / folder).iterdir())


def test_several_archives_and_one_that_is_none(job: Import, archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not an archive")
    more = layouts.write_tar(tmp_path / "y.tar", layouts.members({"a.io/b:c": IMAGE}))
    done = job.run(other, archive, more)
    assert done.code == 5
    assert len(done.statuses) == 4
    assert done.problems == [f"{other}: is neither a tar nor a folder"]


def test_a_source_that_is_not_there_is_said_before_anything_is_read(
    job: Import, archive: Path, tmp_path: Path
) -> None:
    done = job.run(archive, tmp_path / "missing.tar")
    assert done.code == 2
    assert "missing.tar: no such file" in done.stderr
    assert not job.store.exists()


# Names


@pytest.mark.parametrize(
    ("in_archive", "given", "expected"),
    [
        ("1.0", "quay.io/team/app", "quay.io/team/app:1.0"),
        ("1.0", "quay.io/team/app:2.0", "quay.io/team/app:2.0"),
        ("", "quay.io/team/app", "quay.io/team/app:latest"),
        ("", "localhost:5000/app:x", "localhost:5000/app:x"),
        ("quay.io/team/full:1", "other.io/name", "quay.io/team/full:1"),
    ],
)
def test_an_image_without_a_full_name_is_given_one(
    job: Import, tmp_path: Path, in_archive: str, given: str, expected: str
) -> None:
    files = layouts.members({in_archive: IMAGE}, key=layouts.REF_NAME)
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files), "--name", given)
    assert done.code == 0
    job.check(expected, IMAGE)


@pytest.mark.parametrize("in_archive", ["1.0", ""])
def test_without_a_name_it_is_said_what_to_do(job: Import, tmp_path: Path, in_archive: str) -> None:
    files = layouts.members({in_archive: IMAGE, NAME: MULTI}, key=layouts.REF_NAME)
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 2
    assert done.problems[0].startswith("has "), done.problems
    assert "say --name REGISTRY/REPOSITORY[:TAG]" in done.problems[0]
    assert job.listed() == {NAME: True}


def test_a_given_name_that_nothing_needs_is_said(job: Import, archive: Path) -> None:
    done = job.run(archive, "--name", "a.io/b")
    assert done.code == 0
    [note] = [each["text"] for each in done.events if each["event"] == "note"]
    assert note == "every image has a name of its own; it is for those without"


def test_a_given_name_goes_to_one_image_only(job: Import, tmp_path: Path) -> None:
    index = layouts.index_json([("", IMAGE.top), ("", MULTI.top)])
    files = [(n, index if n == "index.json" else d) for n, d in layouts.members(BOTH)]
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files), "--name", "a.io/b:1")
    assert done.code == 2
    assert "is a.io/b:1 already" in done.problems[0]
    job.check("a.io/b:1", IMAGE)


def test_two_images_of_one_name_are_no_image_and_a_problem(job: Import, tmp_path: Path) -> None:
    index = layouts.index_json([(NAME, IMAGE.top), (NAME, IMAGE.top), (NAME, MULTI.top)])
    files = [(n, index if n == "index.json" else d) for n, d in layouts.members(BOTH)]
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 5
    assert [e["status"] for e in done.events if e["event"] == "image"] == ["incomplete", "imported"]
    job.check(NAME, IMAGE)


def test_a_bad_name_is_refused_at_once(job: Import, archive: Path) -> None:
    done = job.run(archive, "--name", "a.io/UPPER LOWER")
    assert done.code == 2
    assert not job.store.exists()


def test_a_name_by_digest_makes_no_tag(job: Import, tmp_path: Path) -> None:
    name = f"quay.io/team/one@{IMAGE.digest}"
    done = job.run(layouts.write_tar(tmp_path / "x.tar", layouts.members({name: IMAGE})))
    assert done.statuses == {name: "imported"}
    job.check(name, IMAGE)


def test_a_referrer_goes_where_its_subject_is(job: Import, tmp_path: Path) -> None:
    sbom = images.artifact(IMAGE.top)
    signature = images.artifact(sbom.top, artifact_type="application/vnd.example.signature")
    index = layouts.index_json([("", signature.top), ("", sbom.top), (NAME, IMAGE.top)])
    named = {"a": signature, "b": sbom, "c": IMAGE}
    files = [(n, index if n == "index.json" else d) for n, d in layouts.members(named)]
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 0
    for each in (sbom, signature):
        job.check(f"quay.io/team/one@{each.digest}", each)


# What is there already


@pytest.mark.parametrize(
    ("rule", "code", "statuses", "expected"),
    [
        ("keep", 0, {"kept", "imported"}, IMAGE),
        ("replace", 0, {"replaced", "imported"}, MULTI),
        ("error", 3, {"exists", "held back"}, IMAGE),
    ],
)
def test_a_tag_that_stands_for_something_else(
    job: Import, tmp_path: Path, rule: str, code: int, statuses: set[str], expected: images.Image
) -> None:
    job.run(layouts.write_tar(tmp_path / "x.tar", layouts.members({NAME: IMAGE})))
    new = {NAME: MULTI, "a.io/other:1": IMAGE}
    done = job.run(
        layouts.write_tar(tmp_path / "y.tar", layouts.members(new)), "--on-existing", rule
    )
    assert done.code == code
    assert set(done.statuses.values()) == statuses
    assert {e["previous"] for e in done.events if e.get("reference") == NAME} == {IMAGE.digest}
    job.check(NAME, expected)
    assert ("a.io/other:1" in job.listed()) == (rule != "error")


def test_a_delta_by_hand_finds_its_base_in_the_store(job: Import, tmp_path: Path) -> None:
    files = layouts.members({NAME: IMAGE}, without=[IMAGE.layers[0]])
    delta = layouts.write_tar(tmp_path / "delta.tar", files)
    done = job.run(delta)
    assert done.code == 5
    assert done.problems == [f"layer {IMAGE.layers[0].digest}: neither here nor in the store"]
    assert job.listed() == {}
    base = {"quay.io/team/base:1": images.image("import", layers=1, layer_size=300_000)}
    job.run(layouts.write_tar(tmp_path / "base.tar", layouts.members(base)))
    assert job.run(delta).code == 0
    job.check(NAME, IMAGE)


def test_a_running_server_sees_it_at_once(
    tmp_path: Path, archive: Path, mirror: Callable[..., Mirror]
) -> None:
    job = Import(tmp_path)
    server = mirror(store=job.store, args=["--offline"])
    assert server.manifest("quay.io", "team/one", "1").status == 404
    assert job.run(archive).code == 0
    answer = server.manifest("quay.io", "team/one", "1")
    assert (answer.status, answer.body) == (200, IMAGE.top.data)
    blob = server.blob("quay.io", "team/one", IMAGE.layers[0].digest)
    assert blob.body == IMAGE.layers[0].data


# Damage


def test_a_sparse_index_is_whole(job: Import, tmp_path: Path) -> None:
    arm64 = MULTI.manifests[1]
    absent = [arm64, *(b for b in MULTI.blobs if b.encoded in arm64.data.decode())]
    files = layouts.members({NAME: MULTI}, without=absent)
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 0
    assert [e["leftOut"] for e in done.events if e["event"] == "image"] == [["linux/arm64"]]
    assert job.listed() == {NAME: True}
    job.check(NAME, MULTI, without=[each.digest for each in absent])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_damage_holds_back_the_image_it_is_in(job: Import, tmp_path: Path, which: int) -> None:
    data = bytearray(IMAGE.blobs[which].data)
    data[len(data) // 2] ^= 1
    replaced = {IMAGE.blobs[which].digest: bytes(data)}
    done = job.run(layouts.write_tar(tmp_path / "x.tar", layouts.members(BOTH, replaced=replaced)))
    assert done.code == 5
    assert done.statuses == {NAME: "incomplete", "docker.io/library/two:2": "imported"}
    (problem,) = done.problems
    assert IMAGE.blobs[which].digest in problem
    assert "expected digest" in problem
    assert IMAGE.blobs[which].encoded not in job.blobs()
    assert list(job.listed()) == ["docker.io/library/two:2"]


def test_after_every_cut_only_whole_images_are_visible(job: Import, archive: Path) -> None:
    whole = archive.read_bytes()
    seen: set[int] = set()
    for cut in range(600, len(whole), 40_000):
        archive.write_bytes(whole[:cut])
        fresh = Import(job.folder / str(cut))
        done = fresh.run(archive)
        assert done.code == (5 if cut < len(whole) - 10_000 else done.code)
        listed = fresh.listed()
        seen.add(len(listed))
        assert all(listed.values())
        for name in listed:
            fresh.check(name, (BOTH | DOCKER)[name])
    assert len(seen) > 1


def test_a_sound_copy_after_a_cut_one_is_enough(job: Import, archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:500_000])
    done = job.run(cut)
    assert done.code == 5
    assert any("is cut off" in problem for problem in done.problems)
    assert job.run(archive).code == 0
    for name, image in (BOTH | DOCKER).items():
        job.check(name, image)


@pytest.mark.parametrize("twice", ["index.json", "oci-layout"])
def test_two_files_that_say_what_is_in_it_are_refused(
    job: Import, tmp_path: Path, twice: str
) -> None:
    files = list(layouts.members(BOTH))
    files += [each for each in files if each[0] == twice]
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 5
    assert done.problems == [f"{tmp_path}/x.tar: has two files {twice}"]
    assert job.listed() == {}


def test_a_blob_twice_is_one_blob(job: Import, tmp_path: Path) -> None:
    files = list(layouts.members(BOTH))
    garbage = [(files[-1][0], b"garbage"), (files[2][0], b"garbage")]
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files + garbage))
    assert done.code == 0
    job.check(NAME, IMAGE)


def test_a_store_that_is_read_only_is_one_line(job: Import, archive: Path) -> None:
    job.run(layouts.write_tar(job.folder / "y.tar", layouts.members({"a.io/b:c": IMAGE})))
    with read_only(job.store):
        code, said = job.words(archive)
    assert code == 4
    assert said.count("\n") == 1
    assert "read-only" in said


def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(job: Import, archive: Path) -> None:
    require_root()
    job.store.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", job.store)
    try:
        code, said = job.words(archive)
        assert code == 4
        assert said.count("\n") == 1
        assert "no space left" in said
        assert list((job.store / "pulls").iterdir()) == []
        run("mount", "-o", "remount,size=20m", job.store)
        assert job.run(archive).code == 0
        job.check(NAME, IMAGE)
    finally:
        run("umount", job.store)


def test_words_of_an_archive_do_not_reach_the_terminal(job: Import, tmp_path: Path) -> None:
    odd = images.index({"linux/amd64": IMAGE, "linux/\x1b[31mred": MULTI})
    files = layouts.members({NAME: odd}, without=[MULTI.top])
    code, said = job.words(layouts.write_tar(tmp_path / "x.tar", files))
    assert code == 0
    assert "without linux/?[31mred" in said


def test_our_own_store_is_no_archive(job: Import, archive: Path) -> None:
    job.run(archive)
    done = Import(job.folder / "other").run(job.store)
    assert done.code == 5
    assert "export it" in done.problems[0]


def test_what_people_read(job: Import, archive: Path) -> None:
    code, said = job.words(archive)
    assert code == 0
    lines = said.splitlines()
    assert lines[0] == f"imported {NAME}@{IMAGE.digest[:19]}"
    assert lines[-1].startswith("3 imported in ")


# Memory

PEAK = """
import re, sys
from pathlib import Path
from ociproxy.cli.main import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak(job: Import, archive: Path) -> int:
    """Bytes that the import of an archive took at most."""
    command = [sys.executable, "-c", PEAK, "import", str(archive)]
    done = run(*command, "--image-path", job.folder / archive.stem, cwd=ROOT)
    return int(done.stdout) * 1024


def test_memory_grows_neither_with_the_size_nor_with_the_number_of_blobs(
    job: Import, tmp_path: Path
) -> None:
    shapes = {"small": (10, 1000), "large": (1, 80 * images.MIB), "many": (3000, 1000)}
    peaks = {}
    for name, (count, size) in shapes.items():
        layers = (images.random_blob(size, seed=n) for n in range(count))
        image = images.image_of(images.Layer(each, each.digest) for each in layers)
        archive = layouts.write_tar(tmp_path / f"{name}.tar", layouts.members({NAME: image}))
        peaks[name] = peak(job, archive)
    allowance = 16 * images.MIB
    assert peaks["large"] < peaks["small"] + allowance
    assert peaks["many"] < peaks["small"] + allowance


# Interruption


def test_killed_at_any_moment_it_goes_on(job: Import, tmp_path: Path) -> None:
    many = {
        f"quay.io/team/app-{n}:1": images.image(f"app{n}", layer_size=3_000_000) for n in range(20)
    }
    archive = layouts.write_tar(tmp_path / "x.tar", layouts.members(many))
    moments = random.Random(7)
    for _ in range(8):
        process = subprocess.Popen(
            job.command(archive), cwd=ROOT, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        time.sleep(0.2 + 0.5 * moments.random())
        process.kill()
        process.wait(10)
        listed = job.listed()
        assert all(listed.values())
        for name in listed.keys() & many.keys():  # others are known by digest, their tag to come
            store_check(job, name, many[name])
    assert job.run(archive).code == 0
    for name, image in many.items():
        job.check(name, image)


def store_check(job: Import, name: str, image: images.Image) -> None:
    for blob in image.blobs:
        assert (job.store / "blobs" / blob.encoded).read_bytes() == blob.data, name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_so_and_leaves_nothing_behind(
    job: Import, archive: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        job.command("-"), cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(archive.read_bytes()[:400_000])
    process.stdin.flush()
    limit = time.monotonic() + 20
    while not job.store.exists() or not list((job.store / "blobs").iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"run it again" in said
    assert b"Traceback" not in said
    assert list((job.store / "pulls").iterdir()) == []
