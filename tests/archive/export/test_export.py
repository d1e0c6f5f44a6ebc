"""Archives: what is in them, that equal content makes equal bytes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ociproxy.archive.export.selection import by_patterns
from ociproxy.archive.lock import Lock, read_lock
from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests.images import (
    MIB,
    OCI_INDEX,
    OCI_MANIFEST,
    Image,
    artifact,
    content,
    image,
    index,
    multi_platform,
)
from tests.stores import damage, put, record_tag, stored

NAME = "io.containerd.image.name"
REF = "org.opencontainers.image.ref.name"
SUBJECT = "io.containerd.manifest.subject"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run(store: Store, *args: object, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "ociproxy", "export", "--image-path", store.root, *map(str, args)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    if code == 0 and isinstance(args[0], Path) and "--volume-size" not in args:
        read_lock(args[0])  # what is written is read again
    return done


def error(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode()


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
        return found


def names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def entries(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(members(path)["index.json"])["manifests"]
    return found


def blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def lock_in(path: Path) -> Lock:
    return Lock.parse(members(path)["ociproxy-lock.json"], str(path))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is in it


@pytest.mark.parametrize("docker", [False, True])
def test_an_archive_is_a_layout_with_every_byte_as_upstream_made_it(
    store: Store, tmp_path: Path, docker: bool
) -> None:
    made = multi_platform(docker=docker, layers=2)
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar")
    found = members(tmp_path / "a.tar")
    assert json.loads(found["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    [entry] = entries(tmp_path / "a.tar")
    assert entry["digest"] == made.digest
    assert entry["mediaType"] == made.top.media_type
    assert entry["size"] == made.top.size
    assert entry["annotations"] == {NAME: "quay.io/a/b:1", REF: "quay.io/a/b:1"}
    blobs = {name: data for name, data in found.items() if name.startswith("blobs/")}
    assert blobs == {blob_name(each.digest): each.data for each in made.all_content()}


def test_parents_come_before_children_and_the_small_before_the_large(
    store: Store, tmp_path: Path
) -> None:
    made = multi_platform(layers=2)
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar")
    order = names(tmp_path / "a.tar")
    assert order[:3] == ["oci-layout", "index.json", "ociproxy-lock.json"]
    configs = [blob for blob in made.blobs if blob not in made.layers]
    kinds: list[list[str]] = [
        [blob_name(made.digest)],
        sorted(blob_name(each.digest) for each in made.manifests),
        sorted(blob_name(each.digest) for each in configs),
        sorted(blob_name(each.digest) for each in made.layers),
    ]
    assert order[3:] == [name for kind in kinds for name in kind]


def test_headers_say_nothing_of_who_wrote_them(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    run(store, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in tar}
    assert facts == {(0, 0, 0, "", "", 0o644, True)}


def test_the_same_content_is_the_same_file_whatever_the_order_and_the_day(tmp_path: Path) -> None:
    made = {
        "quay.io/a/b:1": multi_platform(),
        "nginx": image("nginx", docker=True, layers=3),
        "quay.io/a/b:2": image("two"),
    }
    referrer = artifact(made["quay.io/a/b:2"].top)
    sums = []
    for number, order in enumerate([list(made), list(made)[::-1]]):
        store = Store(tmp_path / str(number))
        if number:
            put(store, f"quay.io/a/b@{referrer.digest}", referrer)
        for reference in order:
            put(store, reference, made[reference], resolved=1.7e9 + number * 1e6)
        put(store, f"quay.io/a/b@{referrer.digest}", referrer)
        run(store, tmp_path / f"{number}.tar")
        sums.append(sha256(tmp_path / f"{number}.tar"))
        assert hashlib.sha256(run(store, "-").stdout).hexdigest() == sums[-1]
    assert sums[0] == sums[1]


def test_a_checksum_lies_beside_it_that_sha256sum_reads(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    run(store, tmp_path / "a.tar")
    check = ["sha256sum", "--check", "--strict", "a.tar.sha256"]
    subprocess.run(check, cwd=tmp_path, check=True, capture_output=True)
    assert sorted(each.name for each in tmp_path.glob("a.tar*")) == ["a.tar", "a.tar.sha256"]


def test_the_lock_inside_says_all_that_the_archive_has(store: Store, tmp_path: Path) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar")
    lock = lock_in(tmp_path / "a.tar")
    [locked] = lock.images
    assert (str(locked.reference), str(locked.descriptor.digest)) == ("quay.io/a/b:1", made.digest)
    assert list(map(str, locked.platforms)) == ["linux/amd64", "linux/arm/v7", "linux/arm64"]
    assert {str(digest): size for digest, size in lock.contents.items()} == {
        each.digest: each.size for each in made.all_content()
    }


def test_an_image_without_a_tag_is_named_by_its_digest(store: Store, tmp_path: Path) -> None:
    made = image()
    put(store, f"quay.io/a/b@{made.digest}", made)
    run(store, tmp_path / "a.tar")
    [entry] = entries(tmp_path / "a.tar")
    assert entry["annotations"][NAME] == f"quay.io/a/b@{made.digest}"


def test_digest_names_are_second_names(store: Store, tmp_path: Path) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar", "--digest-names")
    found = {each["annotations"][NAME]: each["digest"] for each in entries(tmp_path / "a.tar")}
    assert found == dict.fromkeys(["quay.io/a/b:1", f"quay.io/a/b@{made.digest}"], made.digest)


def test_a_name_that_does_not_fit_a_plain_header_comes_through(
    store: Store, tmp_path: Path
) -> None:
    made = image()
    long = Image(content(made.top.data, made.top.media_type, algorithm="sha512"), blobs=made.blobs)
    put(store, "quay.io/a/b:1", long)
    run(store, tmp_path / "a.tar")
    assert members(tmp_path / "a.tar")[blob_name(long.digest)] == made.top.data


# Referrers


def test_stored_referrers_come_along_and_say_whose_they_are(store: Store, tmp_path: Path) -> None:
    made = image()
    sbom = artifact(made.top)
    put(store, "quay.io/a/b:1", made)
    put(store, f"quay.io/a/b@{sbom.digest}", sbom)
    put(store, f"quay.io/a/b:{made.digest.replace(':', '-')}.sig", image("signature"))
    put(store, "quay.io/a/other:1", image("other"))
    run(store, tmp_path / "a.tar", "quay.io/a/b:1")
    *named, nameless = entries(tmp_path / "a.tar")
    assert sorted(each["annotations"][NAME] for each in named) == [
        "quay.io/a/b:1",
        f"quay.io/a/b:{made.digest.replace(':', '-')}.sig",
    ]
    assert nameless["digest"] == sbom.digest
    assert nameless["annotations"] == {SUBJECT: made.digest}
    assert nameless["artifactType"] == "application/vnd.example.sbom.v1"
    assert blob_name(sbom.blobs[1].digest) in names(tmp_path / "a.tar")

    run(store, tmp_path / "b.tar", "quay.io/a/b:1", "--no-referrers")
    assert [each["digest"] for each in entries(tmp_path / "b.tar")] == [made.digest]
    assert blob_name(sbom.digest) not in names(tmp_path / "b.tar")


def test_without_referrers_their_tags_are_left_out_too(store: Store, tmp_path: Path) -> None:
    made = image()
    sbom = artifact(made.top)
    put(store, "quay.io/a/b:1", made)
    put(store, f"quay.io/a/b@{sbom.digest}", sbom)
    tag = f"quay.io/a/b:{made.digest.replace(':', '-')}"
    put(store, tag, index({"linux/amd64": sbom}))
    for suffix in (".sig", ".att", ".sbom"):
        put(store, f"{tag}{suffix}", image(suffix))
    run(store, tmp_path / "all.tar")
    assert len(lock_in(tmp_path / "all.tar").images) == 5
    for patterns in ((), ("*",), ("quay.io/a/b:*",)):
        run(store, tmp_path / "a.tar", *patterns, "--no-referrers")
        assert [str(each.reference) for each in lock_in(tmp_path / "a.tar").images] == [
            "quay.io/a/b:1"
        ]
        assert [each["digest"] for each in entries(tmp_path / "a.tar")] == [made.digest]


# Selection


def test_patterns_choose_by_reference(store: Store, tmp_path: Path) -> None:
    for reference in ("quay.io/a/b:1", "quay.io/a/b:2", "nginx:1"):
        put(store, reference, image(reference))
    run(store, tmp_path / "a.tar", "quay.io/*:2", "*/library/*")
    found = [each["annotations"][NAME] for each in entries(tmp_path / "a.tar")]
    assert sorted(found) == ["docker.io/library/nginx:1", "quay.io/a/b:2"]


def test_what_a_moved_tag_left_behind_is_taken_only_if_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = {name: image(name, layers=1, layer_size=100) for name in ("old", "new", "pulled")}
    put(store, "quay.io/team/app:v1", made["old"])
    put(store, f"quay.io/team/app@{made['pulled'].digest}", made["pulled"])
    put(store, "quay.io/team/app:v1", made["new"])
    notes: list[str] = []

    def chosen(*patterns: str) -> set[str]:
        return {
            str(each.descriptor.digest) for each in by_patterns(store, patterns, (), notes.append)
        }

    by_digest = {made["pulled"].digest}  # a client or a load named it so
    assert chosen() == {made["new"].digest} | by_digest
    assert notes == [
        f"quay.io/team/app@{made['old'].digest} is left out: its tag has moved. "
        "'*@*' matches such images"
    ]
    assert chosen("*/team/*") == {made["new"].digest} | by_digest
    assert chosen("*@*") == {made["old"].digest} | by_digest
    put(store, "quay.io/team/app:v1", made["old"])
    assert chosen() == {made["old"].digest} | by_digest


def test_a_pattern_that_matches_nothing_is_named(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    done = run(store, tmp_path / "a.tar", "quay.io/*", "typo*", code=3)
    assert "typo*" in error(done)
    assert list(tmp_path.glob("a.tar*")) == []


def test_an_empty_store_has_nothing_to_export(store: Store, tmp_path: Path) -> None:
    assert "the store is empty" in error(run(store, tmp_path / "a.tar", code=3))


def test_a_lock_takes_its_digests_wherever_the_tags_are_now(store: Store, tmp_path: Path) -> None:
    old, new = image("old"), image("new")
    put(store, "quay.io/a/b:1", old)
    run(store, tmp_path / "a.tar")
    (tmp_path / "site.lock").write_bytes(members(tmp_path / "a.tar")["ociproxy-lock.json"])
    put(store, "quay.io/a/b:1", new)
    run(store, tmp_path / "b.tar", "--lock", tmp_path / "site.lock")
    assert sha256(tmp_path / "a.tar") == sha256(tmp_path / "b.tar")


def test_a_list_takes_its_references_for_its_platforms(store: Store, tmp_path: Path) -> None:
    made, pinned = multi_platform(), image("nginx")
    put(store, "quay.io/a/b:1", made)
    put(store, "quay.io/a/b:2", image("two"))
    put(store, "nginx:1", pinned)
    (tmp_path / "list").write_text(
        f"quay.io/a/b:1 platform=linux/arm64\nnginx:1@{pinned.digest}  # pinned\n"
    )
    run(store, tmp_path / "a.tar", "--list", tmp_path / "list")
    found = [each["annotations"][NAME] for each in entries(tmp_path / "a.tar")]
    assert sorted(found) == ["docker.io/library/nginx:1", "quay.io/a/b:1"]
    platforms = [list(map(str, each.platforms)) for each in lock_in(tmp_path / "a.tar").images]
    assert platforms == [["linux/amd64"], ["linux/arm64"]]

    (tmp_path / "list").write_text("quay.io/a/b:3\n")
    done = run(store, tmp_path / "b.tar", "--list", tmp_path / "list", code=3)
    assert "quay.io/a/b:3" in error(done)
    (tmp_path / "list").write_text(f"nginx:1@{made.digest}\n")
    done = run(store, tmp_path / "b.tar", "--list", tmp_path / "list", code=5)
    assert pinned.digest in error(done)


def test_a_platform_leaves_the_index_as_it_is_and_the_others_out(
    store: Store, tmp_path: Path
) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar", "--platform", "linux/aarch64")
    found = members(tmp_path / "a.tar")
    assert found[blob_name(made.digest)] == made.top.data
    assert blob_name(made.manifests[1].digest) in found
    assert blob_name(made.manifests[0].digest) not in found
    assert list(map(str, lock_in(tmp_path / "a.tar").images[0].platforms)) == ["linux/arm64"]


# Refusals


def test_an_image_that_is_for_another_platform_is_named(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/one:1", image("one"))
    put(store, "quay.io/a/multi:1", multi_platform())
    other = run(store, tmp_path / "x.tar", "--platform", "linux/arm64")
    assert "another platform: quay.io/a/one:1 (linux/amd64)\n" in error(other)
    same = run(store, tmp_path / "y.tar", "--platform", "linux/amd64")
    assert "another platform" not in error(same)


def test_an_incomplete_image_is_refused_by_name_and_digest(store: Store, tmp_path: Path) -> None:
    made, whole = image("broken"), image("whole")
    put(store, "quay.io/a/b:1", made)
    put(store, "quay.io/a/b:2", whole)
    stored(store, made.layers[0]).unlink()
    done = run(store, tmp_path / "a.tar", code=3)
    assert "quay.io/a/b:1" in error(done)
    assert made.layers[0].digest in error(done)
    assert "incomplete images: 1; " in error(done)
    assert "--allow-partial" in error(done)
    assert "quay.io/a/b:2" not in error(done)
    assert list(tmp_path.glob("a.tar*")) == []

    run(store, tmp_path / "b.tar", "--allow-partial", "--format", "oci")
    assert "manifest.json" not in names(tmp_path / "b.tar")
    run(store, tmp_path / "a.tar", "--allow-partial")
    partial, complete = sorted(lock_in(tmp_path / "a.tar").images, key=lambda i: str(i.reference))
    assert (partial.complete, complete.complete) == (False, True)
    assert [str(digest) for digest in partial.missing] == [made.layers[0].digest]


def test_a_tag_of_which_only_a_head_was_seen_does_not_stop_an_export(
    store: Store, tmp_path: Path
) -> None:
    made = image("whole")
    put(store, "quay.io/team/whole:1", made)
    asked = Reference.parse("quay.io/team/asked:1").repository
    signed = Reference.parse("quay.io/team/whole:1").repository
    for repository, tag in ((asked, "1"), (signed, made.digest.replace(":", "-") + ".sig")):
        unseen = Descriptor(OCI_MANIFEST, Digest.of(tag.encode()), 500)
        record_tag(store, repository, tag, unseen, now=1_800_000_000.0)
    archive = tmp_path / "a.tar"
    for patterns in ([], ["quay.io/*"]):
        done = run(store, archive, *patterns)
        assert "quay.io/team/asked:1 is left out" in error(done)
        assert [str(each.reference) for each in lock_in(archive).images] == ["quay.io/team/whole:1"]
    command = [sys.executable, "-m", "ociproxy", "diff", str(store.root), str(archive)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert "quay.io/team/asked:1" in error(run(store, archive, "quay.io/team/asked:1", code=3))


def test_a_platform_that_is_not_stored_is_a_gap(store: Store, tmp_path: Path) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    stored(store, made.manifests[1]).unlink()
    run(store, tmp_path / "a.tar")
    done = run(store, tmp_path / "b.tar", "--platform", "linux/arm64", code=3)
    assert "linux/arm64 not stored" in error(done)


@pytest.mark.parametrize("volumes", [(), ("--volume-size", "1M")])
def test_a_corrupt_blob_is_refused_and_leaves_nothing(
    store: Store, tmp_path: Path, volumes: tuple[str, ...]
) -> None:
    made = image(layer_size=3 * MIB // 4, layers=2)
    put(store, "quay.io/a/b:1", made)
    damage(stored(store, made.layers[1]), 500_000)
    done = run(store, tmp_path / "a.tar", *volumes, code=5)
    assert made.layers[1].digest in error(done)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store"]


def test_a_corrupt_manifest_is_a_gap(store: Store, tmp_path: Path) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    damage(stored(store, made.top))
    assert made.digest in error(run(store, tmp_path / "a.tar", code=3))


def test_an_older_archive_stays_when_a_new_one_fails(store: Store, tmp_path: Path) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar")
    before = sha256(tmp_path / "a.tar")
    damage(stored(store, made.layers[0]))
    run(store, tmp_path / "a.tar", code=5)
    assert sha256(tmp_path / "a.tar") == before


def test_what_a_killed_export_left_is_in_nobodys_way(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    (tmp_path / "a.tar.tmp").write_bytes(b"x" * 10_000_000)
    run(store, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_size < 100_000
    assert not (tmp_path / "a.tar.tmp").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["{t}/no/such/a.tar"], "no such file or directory"),
        (["{t}"], "is a folder"),
        (["/dev/full/x"], "not a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    store: Store, tmp_path: Path, args: list[str], reason: str
) -> None:
    put(store, "quay.io/a/b:1", image())
    done = run(store, *(each.format(t=tmp_path) for each in args), code=4)
    assert reason in error(done)


def test_the_place_of_a_pipe_or_of_a_device_is_not_taken(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    os.mkfifo(tmp_path / "pipe")
    done = run(store, tmp_path / "pipe", code=4)
    assert "is not a regular file" in error(done)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.tar.tmp").symlink_to(tmp_path / "mine")
    run(store, tmp_path / "a.tar", code=4)
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "b.tar.sha256.tmp").symlink_to(tmp_path / "mine")
    run(store, tmp_path / "b.tar")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "b.tar.sha256").is_symlink()


def test_an_archive_s_words_do_not_reach_the_terminal(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image())
    info = tarfile.TarInfo("\x1b]0;obey\x07\x9b2J")
    info.size = 1000
    (tmp_path / "base.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT))
    done = run(store, tmp_path / "a.tar", "--since", tmp_path / "base.tar", code=5)
    assert "is cut off inside ?]0;obey??2J" in error(done)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["a.tar", "--zstd"], "the name has to end in .zst"),
        (["a.tar.zst"], "needs --zstd"),
        (["-", "--volume-size", "1G"], "--volume-size needs a file name"),
        (["a.tar", "--volume-size", "much"], "is not a size"),
        (["a.tar", "--platform", "amd64"], "os/architecture"),
        (["a.tar", "x", "--lock", "y"], "exclude each other"),
        (["a.tar", "--list", "/no/such/list"], "/no/such/list"),
        (["a.tar", "--lock", "/no/such/lock"], "/no/such/lock"),
        (["a.tar", "--since", "/no/such/lock"], "/no/such/lock"),
    ],
)
def test_a_usage_mistake_is_explained(
    store: Store, tmp_path: Path, args: list[str], reason: str
) -> None:
    put(store, "quay.io/a/b:1", image())
    assert reason in error(run(store, *args, code=2))


def test_a_full_disk_is_said_in_one_line(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image(layer_size=MIB))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ociproxy", "export", "--image-path", store.root, "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 4
    assert b"no space left" in done.stderr
    assert b"Traceback" not in done.stderr


# For other tools


def test_flattening_names_the_platforms_manifest_and_says_so(store: Store, tmp_path: Path) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    put(store, "nginx:1", image("nginx"))
    done = run(store, tmp_path / "a.tar", "--format", "oci", "--platform", "linux/amd64")
    assert "taken out of their index: 1 of 2 images" in error(done)
    nginx, flat = entries(tmp_path / "a.tar")
    assert flat["digest"] == made.manifests[0].digest
    assert flat["platform"] == {"os": "linux", "architecture": "amd64"}
    assert blob_name(made.digest) not in names(tmp_path / "a.tar")
    locked = {str(each.reference): each for each in lock_in(tmp_path / "a.tar").images}
    assert locked["quay.io/a/b:1"].flattened_from == Digest.parse(made.digest)
    assert locked["docker.io/library/nginx:1"].flattened_from is None
    docker = json.loads(members(tmp_path / "a.tar")["manifest.json"])
    assert sorted(each["RepoTags"][0] for each in docker) == [
        "docker.io/library/nginx:1",
        "quay.io/a/b:1",
    ]
    assert all(blob in names(tmp_path / "a.tar") for each in docker for blob in each["Layers"])
    assert nginx["annotations"][NAME] == "docker.io/library/nginx:1"


def test_flattening_needs_one_platform(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", multi_platform(platforms=("linux/amd64", "linux/arm64")))
    done = run(store, tmp_path / "a.tar", "--format", "oci", code=2)
    assert "quay.io/a/b:1 has linux/amd64 and linux/arm64" in error(done)
    assert "--platform" in error(done)


def test_what_is_no_image_keeps_the_docker_manifest_away(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/chart:1", artifact(image().top))
    put(store, "quay.io/a/empty:1", index({}))
    done = run(store, tmp_path / "a.tar", "--format", "oci")
    assert "manifest.json" not in names(tmp_path / "a.tar")
    assert "Warning: not all of it can be run" in error(done)
    assert "--no-unpack" in error(done)


# Deltas


@pytest.mark.parametrize("base", ["archive", "zstd", "lock"])
def test_a_delta_carries_what_the_receiver_lacks(store: Store, tmp_path: Path, base: str) -> None:
    put(store, "quay.io/a/b:1", image("old", layer_size=MIB, layers=3))
    put(store, "quay.io/a/c:1", image("kept", layer_size=MIB))
    first = tmp_path / ("a.tar.zst" if base == "zstd" else "a.tar")
    run(store, first, *(["--zstd"] if base == "zstd" else []))
    if base == "lock":
        (tmp_path / "l").write_bytes(members(first)["ociproxy-lock.json"])
        first = tmp_path / "l"
    fresh = image("fresh", layer_size=1000)
    put(store, "quay.io/a/b:1", fresh)
    stored_old = f"quay.io/a/b@{image('old', layer_size=MIB, layers=3).digest}"
    run(store, tmp_path / "d.tar", "*:*", "*@*", "--since", first)
    assert (tmp_path / "d.tar").stat().st_size < 200_000
    lock = lock_in(tmp_path / "d.tar")
    held = {name for name in names(tmp_path / "d.tar") if name.startswith("blobs/")}
    told = {blob_name(str(digest)) for digest in lock.contents}
    assert told - held == {blob_name(str(digest)) for digest in lock.omitted}
    assert {blob_name(each.digest) for each in fresh.all_content()} <= held
    assert lock.base is not None
    assert stored_old in {str(each.reference) for each in lock.images}


# Volumes


def test_volumes_are_tars_of_whole_blobs_that_know_each_other(store: Store, tmp_path: Path) -> None:
    made = image(layer_size=MIB, layers=5)
    put(store, "quay.io/a/b:1", made)
    run(store, tmp_path / "a.tar", "--volume-size", "2500KiB")
    parts = sorted(tmp_path.glob("a.*.tar"))
    assert [each.name for each in parts] == ["a.1of3.tar", "a.2of3.tar", "a.3of3.tar"]
    assert all(each.stat().st_size <= 2500 * 1024 for each in parts)
    together: dict[str, bytes] = {}
    for number, part in enumerate(parts, 1):
        found = members(part)
        assert names(part)[0] == "ociproxy-volume.json"
        label = json.loads(found.pop("ociproxy-volume.json"))
        assert (label["volume"], label["volumes"]) == (number, 3)
        last = json.loads(found.pop("ociproxy-parts.json"))
        assert last["set"] == label["set"]
        assert names(part)[-1] == "ociproxy-parts.json"
        for described, each in zip(last["parts"], parts, strict=True):
            body = each.read_bytes()[: described["size"]]
            assert hashlib.sha256(body).hexdigest() == described["sha256"]
        assert together.keys().isdisjoint(found)
        together.update(found)
    run(store, tmp_path / "whole.tar")
    assert together == members(tmp_path / "whole.tar")
    check = ["sha256sum", "--check", "--strict", "a.tar.sha256"]
    subprocess.run(check, cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("since", [[], ["--since", "a.tar"]])
def test_an_archive_of_other_content_is_not_overwritten(
    store: Store, tmp_path: Path, since: list[str]
) -> None:
    put(store, "quay.io/a/b:1", image("one"))
    archive = tmp_path / "a.tar"
    since = [str(archive) if word == "a.tar" else word for word in since]
    run(store, archive)
    run(store, archive)  # the same content is the same file
    before = archive.read_bytes()
    put(store, "quay.io/a/b:2", image("two"))
    refused = run(store, archive, *since, code=2)
    assert "a.tar: is an archive of other content, which a delta may need: " in error(refused)
    assert "another file, or say --force" in error(refused)
    assert archive.read_bytes() == before
    run(store, archive, *since, "--force")
    assert archive.read_bytes() != before


def test_a_file_that_is_no_archive_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    """Such as the list of images of a user who forgot --list."""
    put(store, "quay.io/a/b:1", image("one"))
    images = tmp_path / "images.txt"
    images.write_text("quay.io/a/b:1\n")
    refused = run(store, images, code=2)
    assert "images.txt: is no archive: name another file, or say --force" in error(refused)
    assert images.read_text() == "quay.io/a/b:1\n"
    run(store, images, "--force")
    archive = tmp_path / "a.tar"
    archive.touch()  # as mktemp does
    run(store, archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:1000])  # as an interrupted copy leaves it
    run(store, archive)
    assert archive.read_bytes() == whole == images.read_bytes()


def test_volumes_of_an_earlier_export_are_removed(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image(layer_size=MIB, layers=5))
    run(store, tmp_path / "a.tar", "--volume-size", "1500K")
    keep = ["a.tar", "ab.1of9.tar", "a.1of9.zip", "a.b.1of9.tar"]
    for name in keep:
        (tmp_path / name).write_text("mine")
    assert len(list(tmp_path.glob("a.?of5.tar"))) == 5
    run(store, tmp_path / "a.tar", "--volume-size", "1G")
    assert [each.name for each in sorted(tmp_path.glob("a.?of?.tar"))] == ["a.1of1.tar"]
    assert all((tmp_path / name).read_text() == "mine" for name in keep)


def test_a_blob_that_no_volume_holds_says_what_size_it_needs(store: Store, tmp_path: Path) -> None:
    made, small = image(layer_size=2 * MIB), image(layer_size=MIB + 500_000)
    put(store, "quay.io/a/b:1", made)
    put(store, "quay.io/a/c:1", small)
    done = run(store, tmp_path / "a.tar", "--volume-size", "1M", code=2)
    assert made.layers[0].digest in error(done), "the largest, not the first"
    needed = error(done).partition("--volume-size ")[2].split()[0]
    run(store, tmp_path / "a.tar", "--volume-size", needed)
    run(store, tmp_path / "a.tar", "--volume-size", int(needed) - 1, code=2)


def test_a_lock_that_no_volume_holds_says_so(store: Store, tmp_path: Path) -> None:
    for number in range(30):
        put(store, f"quay.io/a/b:{number}", image(str(number), layer_size=100))
    done = run(store, tmp_path / "a.tar", "--volume-size", "100", code=2)
    assert "the lock" in error(done)
    needed = error(done).partition("--volume-size ")[2].split()[0]
    run(store, tmp_path / "a.tar", "--volume-size", needed)


def test_a_terminal_gets_no_archive(store: Store) -> None:
    put(store, "quay.io/a/b:1", image())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ociproxy", "export", "--image-path", str(store.root), "-"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert b"nothing for a terminal" in done.stderr


# Compression


def test_zstd_wraps_the_same_tar(store: Store, tmp_path: Path) -> None:
    put(store, "quay.io/a/b:1", image(layer_size=MIB))
    run(store, tmp_path / "a.tar")
    done = run(store, tmp_path / "a.tar.zst", "--zstd", "--json")
    report = json.loads(done.stdout)
    with (tmp_path / "a.tar.zst").open("rb") as packed:
        plain = zstandard.ZstdDecompressor(max_window_size=32 * MIB).stream_reader(packed).read()
    assert hashlib.sha256(plain).hexdigest() == sha256(tmp_path / "a.tar")
    [file] = report["files"]
    assert file["tarDigest"] == f"sha256:{sha256(tmp_path / 'a.tar')}"
    assert file["digest"] == f"sha256:{sha256(tmp_path / 'a.tar.zst')}"


def test_one_of_two_windows_versions_is_exported_by_its_version(
    store: Store, tmp_path: Path
) -> None:
    versions = {"10.0.17763.5820": image("2019"), "10.0.20348.2461": image("2022")}
    entries_of = [
        each.top.descriptor(
            platform={"os": "windows", "architecture": "amd64", "os.version": version}
        )
        for version, each in versions.items()
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries_of}
    blobs = tuple(blob for each in versions.values() for blob in each.blobs)
    top = content(json.dumps(document).encode(), OCI_INDEX)
    put(store, "quay.io/a/b:1", Image(top, tuple(e.top for e in versions.values()), blobs))
    form = ("--format", "oci", "--platform")
    done = run(store, tmp_path / "a.tar", *form, "windows/amd64", code=2)
    assert "windows/amd64:10.0.17763.5820 and windows/amd64:10.0.20348.2461" in error(done)
    run(store, tmp_path / "b.tar", *form, "windows/amd64:10.0.20348")
    [entry] = entries(tmp_path / "b.tar")
    assert entry["digest"] == versions["10.0.20348.2461"].digest
    assert entry["platform"]["os.version"] == "10.0.20348.2461"
    [locked] = lock_in(tmp_path / "b.tar").images
    assert [str(each) for each in locked.platforms] == ["windows/amd64:10.0.20348.2461"]
