"""`ociproxy prune` as an operator meets it: what goes, what stays, what it says."""

from __future__ import annotations

import gc
import os
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from bench.many import Many, make_store
from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Reference
from ociproxy.store import removal
from ociproxy.store.pruning.carry_out import carry_out
from ociproxy.store.pruning.plan import Plan, Selection, make_plan
from ociproxy.store.pruning.removed import add_removed, read_removed
from ociproxy.store.pruning.stored import StoredFile, StoredFiles
from ociproxy.store.pruning.survey import Survey
from ociproxy.store.store import Store
from ociproxy.store.usage import Usage
from tests import forked
from tests.images import Image, artifact, content, image, multi_platform, random_blob
from tests.pruning import (
    DAY,
    Done,
    age,
    command,
    content_files,
    listed,
    names_of,
    prune,
    put_aged,
    run,
    sharing,
)
from tests.stores import put, record_tag, stored

OLD, OTHER, NEW = sharing("old", "other", "new")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three images that share a layer: two of them were not used for long."""
    store = Store(tmp_path)
    put_aged(store, "quay.io/team/old:v1", OLD, 60)
    put_aged(store, "quay.io/team/other:v1", OTHER, 40)
    put_aged(store, "docker.io/library/new:v1", NEW, 1)
    age_shared(store, 60)
    return store


def age_shared(store: Store, days: float) -> None:
    age(store, OLD.layers[0], days)


def own(made: Image) -> set[str]:
    return names_of(made) - {OLD.layers[0].encoded}


def test_a_pattern_takes_its_images_and_leaves_the_layers_that_others_need(store: Store) -> None:
    done = prune(store.root, "*/team/old:*")
    assert done.images == ["quay.io/team/old:v1"]
    assert {digest.partition(":")[2] for _, digest, _ in done.content} == own(OLD)
    assert content_files(store.root) == names_of(OTHER, NEW)
    assert listed(store.root) == {"docker.io/library/new:v1": True, "quay.io/team/other:v1": True}
    assert not (store.root / "refs/quay.io/team/old").exists()  # nor an empty folder
    prune(store.root, "*/team/*", "docker.io/library/new:v1", "--all")
    assert content_files(store.root) == set()
    assert list((store.root / "refs").iterdir()) == []


def test_unused_for_and_a_pattern_both_have_to_fit(store: Store) -> None:
    assert prune(store.root, "--unused-for", "50d", "docker.io/*").images == []
    assert prune(store.root, "--unused-for", "50d").images == ["quay.io/team/old:v1"]
    assert prune(store.root, "--older-than", "30d").images == ["quay.io/team/other:v1"]


def test_to_limits_keeps_those_of_the_configuration(store: Store, tmp_path: Path) -> None:
    size = sum(each.size for each in Survey(store).blobs.values())
    config = tmp_path / "config.yaml"

    def to_limits(max_size: int | str, *words: str, code: int = 0) -> Done:
        config.write_text(f"store: {{max_size: {max_size}, min_free: 0}}")
        return prune(store.root, "--to-limits", "--config-path", str(config), *words, code=code)

    assert to_limits("100%").images == []  # not even what no image needs
    planned = to_limits(size, "--dry-run")
    assert planned.images == ["quay.io/team/old:v1"]
    assert {event["cause"] for event in planned.events("image")} == {"store.max_size"}
    names = tmp_path / "names.txt"
    names.write_text("quay.io/team/old:v1\n")
    assert to_limits(size, "--dry-run", "--pinned", str(names)).images == ["quay.io/team/other:v1"]
    done = to_limits(size)
    assert (done.images, done.content) == (planned.images, planned.content)
    assert to_limits(1, "--keep-recent", "2d", code=3).images == ["quay.io/team/other:v1"]
    usage = store.usage.read()
    assert usage is not None
    assert usage.stored == done.summary["size"] - names_size(OTHER)


def test_to_limits_makes_room_for_what_was_promised_to_others(store: Store, tmp_path: Path) -> None:
    """An import reads a blob for minutes once it has been promised room."""
    size = sum(each.size for each in Survey(store).blobs.values())
    config = tmp_path / "config.yaml"
    config.write_text(f"store: {{max_size: {2 * size}, min_free: 0}}")
    words = ("--to-limits", "--dry-run", "--config-path", str(config))
    store.usage.record(size, Usage(), freed=0, stuck=False)
    assert prune(store.root, *words).images == []
    assert store.usage.reserve(size, 2 * size)
    assert prune(store.root, *words).images == ["quay.io/team/old:v1"]
    store.usage.release(size)


def test_a_dry_run_knows_the_room_that_downloads_wait_for_and_says_why_nothing_goes(
    store: Store, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    size = sum(path.stat().st_size for n in ("blobs", "img") for path in (store.root / n).iterdir())
    words = ("--to-limits", "--config-path", str(config))

    def lines(*more: str, code: int) -> list[str]:
        done = run(store.root, "prune", *words, *more, code=code)
        return done.stdout.replace("would remove", "removed").splitlines()

    config.write_text(f"store: {{max_size: {2 * size}, min_free: 0}}")
    [removed, kept, *more] = lines("--dry-run", code=0)
    assert removed.startswith("removed nothing")
    assert kept.startswith("the limits are kept: ")
    assert more == []
    # A download waits for more than is left, and nothing may go.
    store.usage.record(size, Usage(), freed=0, stuck=False)
    store.usage.want(size)
    store.staging.lead(Digest.parse(OTHER.blobs[-1].digest))  # another one arrives
    stay = ("--keep-recent", "50d", "--pinned", str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("quay.io/team/old:v1\n")
    planned = lines("--dry-run", *stay, code=3)
    assert planned[1].startswith("store.max_size wants the store at ")
    assert "downloads wait for room for " in planned[1]
    assert planned[2:] == [
        "2 images stay that were used or stored within 50d",
        "1 image stays that is pinned",
    ]
    assert lines(*stay, code=3) == planned
    # What waited got no room; the next dry run says so.
    assert lines("--dry-run", *stay, code=0)[2].endswith("was wanted")
    store.usage.want(size)
    planned = lines("--dry-run", code=0)
    assert "removed quay.io/team/old:v1" in planned[0]
    assert "1 image stays that is arriving, or needed by a load, an import or an export" in planned
    assert lines(code=0) == planned


def names_size(made: Image) -> int:
    """Bytes of what an image shares with no other."""
    return sum(each.size for each in made.all_content() if each.encoded in own(made))


def test_an_image_that_is_arriving_stays(store: Store) -> None:
    ingest = store.staging.lead(Digest.parse(OLD.blobs[-1].digest))
    assert ingest is not None
    selection = Selection(unused_for=30 * DAY)
    plan = make_plan(store, Survey(store), selection, is_pinned=lambda *_: False, now=time.time())
    assert [str(each.reference) for each in plan.images] == ["quay.io/team/other:v1"]
    assert (plan.recent, plan.reading) == (0, 1)
    ingest.close()


def test_to_size_takes_the_least_recently_used_first(store: Store) -> None:
    size = sum(path.stat().st_size for n in ("blobs", "img") for path in (store.root / n).iterdir())
    done = prune(store.root, "--to-size", str(size - 1))
    assert done.images == ["quay.io/team/old:v1"]
    assert done.summary["size"] < size
    done = prune(store.root, "--to-size", "1", "--keep-recent", "2d", code=3)  # one is recent
    assert done.images == ["quay.io/team/other:v1"]
    assert done.summary["kept"]["recent"] == 1
    assert done.summary["size"] == sum(each.size for each in NEW.all_content())


@pytest.mark.parametrize(
    "words",
    [
        ("*/team/*",),
        ("--unused-for", "30d"),
        ("--unreferenced",),
        ("--to-size", "5000"),
        ("--all", "--keep-recent", "0"),
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_says_exactly_what_the_real_run_then_does(
    store: Store, words: tuple[str, ...]
) -> None:
    for number in range(3):  # no image needs them
        loose = random_blob(100 + number, seed=number)
        staged = store.staging.root / "staged"
        staged.write_bytes(loose.data)
        store.blobs.commit(staged, Digest.parse(loose.digest))
        age(store, loose, 90)
    (store.root / "quarantine").mkdir()
    (store.root / "quarantine" / "bad").write_bytes(b"bad")
    os.utime(store.root / "quarantine" / "bad", (1, 1))
    before = content_files(store.root)
    said = prune(store.root, "--dry-run", *words)
    assert content_files(store.root) == before
    done = prune(store.root, *words)
    assert done.content == said.content != []
    assert done.images == said.images
    assert {**done.summary, "dryRun": True} == said.summary
    gone = before - content_files(store.root)
    assert gone == {d.rpartition(":")[2] for kind, d, _ in done.content if kind != "rubbish"}
    assert prune(store.root, "--dry-run", *words).content == []


def test_what_was_used_within_keep_recent_stays(store: Store) -> None:
    path = stored(store, OTHER.layers[1])
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    done = run(store.root, "prune", "quay.io/*")
    assert "1 image stays that was used or stored within 1h" in done.stdout
    assert listed(store.root) == {"docker.io/library/new:v1": True, "quay.io/team/other:v1": True}
    assert prune(store.root, "--keep-recent", "0", "quay.io/*").images == ["quay.io/team/other:v1"]


@pytest.mark.parametrize("words", [(), ("",), ("*",), ("*/*:*",), ("", "--unused-for", "30d")])
def test_all_has_to_be_said(store: Store, words: tuple[str, ...]) -> None:
    """A variable of a script that is not set must not empty the store."""
    before = content_files(store.root)
    done = run(store.root, "prune", *words, code=2)
    assert "--all" in done.stderr
    assert content_files(store.root) == before


def test_looking_is_no_use(store: Store) -> None:
    """The kernel records a read once a day: a daily look would keep everything in use."""

    def times() -> dict[str, int]:
        folders = ("blobs", "img", "fat")
        found = [path for name in folders for path in (store.root / name).iterdir()]
        return {path.name: path.stat().st_atime_ns for path in found}

    before = times()
    run(store.root, "list")
    prune(store.root, "--dry-run", "--unreferenced")
    assert times() == before


def test_what_a_moved_tag_left_behind_goes_with_unreferenced(store: Store) -> None:
    put_aged(store, "quay.io/team/old:v1", OTHER, 40)
    age_shared(store, 60)
    by_digest = f"quay.io/team/old@{OLD.digest}"
    assert by_digest in listed(store.root)
    assert prune(store.root, "--unreferenced").images == [by_digest]
    assert set(listed(store.root)) == {
        "quay.io/team/old:v1",
        "quay.io/team/other:v1",
        "docker.io/library/new:v1",
    }
    assert all(listed(store.root).values())


def test_an_index_goes_with_its_platforms_and_signatures(store: Store) -> None:
    made = multi_platform("index")
    put_aged(store, "quay.io/team/index:v1", made, 60)
    signature = artifact(made.top, data=b"signature")
    put_aged(store, f"quay.io/team/index@{signature.digest}", signature, 60)
    twin = multi_platform("index", platforms=["linux/arm64"])  # has one of the platforms
    put_aged(store, "quay.io/team/twin:v1", twin, 60)
    done = prune(store.root, "quay.io/team/index:*")
    assert done.images == ["quay.io/team/index:v1"]
    assert content_files(store.root) == names_of(OLD, OTHER, NEW, twin)
    assert listed(store.root)["quay.io/team/twin:v1"]
    assert not list((store.root / "referrers").iterdir())


def test_a_signature_stays_while_an_image_of_its_repository_has_the_subject(store: Store) -> None:
    signature = artifact(OLD.top, data=b"signature")
    put_aged(store, f"quay.io/team/old@{signature.digest}", signature, 60)
    put_aged(store, "quay.io/team/old:again", OLD, 60)
    prune(store.root, "quay.io/team/old:v1")
    old = Reference.parse("quay.io/team/old:again").repository
    found = Store(store.root).refs.referrers(old, Digest.parse(OLD.digest))
    assert [str(each.digest) for each in found] == [signature.digest]
    assert names_of(signature, OLD) <= content_files(store.root)


def test_a_manifest_of_an_unknown_kind_keeps_all_that_it_names(store: Store) -> None:
    blob = random_blob(500, seed="unknown")
    text = f'{{"schemaVersion": 2, "mediaType": "application/x", "parts": ["{blob.digest}"]}}'
    unknown = Image(content(text.encode(), "application/x"), blobs=(blob,))
    put_aged(store, "quay.io/team/unknown:v1", unknown, 60)
    prune(store.root, "--unreferenced")
    assert names_of(unknown) <= content_files(store.root)
    prune(store.root, "*/unknown:v1")
    assert not names_of(unknown) & content_files(store.root)


def test_a_tag_that_is_known_from_its_head_only_goes_too(store: Store) -> None:
    head = Reference.parse("quay.io/team/head:v1")
    made = image("head")
    top = Descriptor(made.top.media_type, Digest.parse(made.digest), made.top.size)
    record_tag(store, head.repository, "v1", top, now=time.time() - 60 * DAY)
    assert prune(store.root, "--unused-for", "50d").images == [
        "quay.io/team/old:v1",
        "quay.io/team/head:v1",
    ]


def test_abandoned_downloads_and_damaged_files_go_with_unreferenced(store: Store) -> None:
    pulls = store.root / "pulls"
    left = random_blob(1000, seed="left")
    led = random_blob(1000, seed="led")
    (pulls / left.encoded).write_bytes(b"x" * 700)
    (pulls / f"{left.encoded}.spans").write_text("0 700\n")
    ingest = store.staging.lead(Digest.parse(led.digest))
    assert ingest is not None
    for path in pulls.iterdir():
        os.utime(path, (1, 1))
    assert prune(store.root, "quay.io/nothing").summary["freed"] == 0
    done = prune(store.root, "--unreferenced")
    assert done.content == [("rubbish", f"sha256:{left.encoded}", 700)]
    assert [path.name for path in pulls.iterdir()] == [led.encoded]
    ingest.close()


def test_a_store_of_another_kind_of_file_is_left_alone(store: Store) -> None:
    for name in ("blobs", "img"):
        (store.root / name / "README").write_text("mine")
        os.utime(store.root / name / "README", (1, 1))
    prune(store.root, "--unreferenced")
    assert (store.root / "blobs" / "README").exists()
    assert (store.root / "img" / "README").exists()


def test_an_image_that_is_published_again_after_the_plan_stays(store: Store) -> None:
    """`commit_manifest` finds the manifest there and writes nothing: the removal has to notice."""
    survey = Survey(store)
    selection = Selection(patterns=("quay.io/*",), keep_recent=0)
    plan = make_plan(store, survey, selection, is_pinned=lambda *_: False, now=time.time())
    assert len(plan.images) == 2
    again = Reference.parse("example.com/again:v1")
    holder = ManifestHolder.of(OLD.top.data, OLD.top.media_type)
    store.commit_manifest(again.repository, holder)
    record_tag(store, again.repository, "v1", holder.descriptor, now=time.time())
    fresh = sharing("fresh")[0]  # needs the layer that all share
    put(store, "example.com/fresh:v1", Image(fresh.top, blobs=(fresh.blobs[0], fresh.layers[1])))
    with store.removals.remover() as remover:
        done = carry_out(store, survey, plan, remover, keep_recent=0)
    assert [str(each.reference) for each in done.images] == ["quay.io/team/other:v1"]
    assert [str(each.reference) for each in done.kept] == ["quay.io/team/old:v1"]
    assert all(listed(store.root).values())
    assert content_files(store.root) >= names_of(OLD) | names_of(fresh)


def test_a_hit_is_not_recorded_whose_manifest_was_removed_meanwhile(store: Store) -> None:
    """The server records it a moment after it answered, and the record would lead nowhere."""
    elsewhere = Reference.parse("example.com/team/app:v1").repository
    descriptor = ManifestHolder.of(OLD.top.data, OLD.top.media_type).descriptor
    prune(store.root, "*/team/old:*")
    store.record_manifest(elsewhere, descriptor)
    assert store.refs.find_manifest(elsewhere, descriptor.digest) is None


def test_two_prunes_at_once(store: Store) -> None:
    with store.removals.remover():
        done = run(store.root, "prune", "quay.io/*", code=75)
        assert "another prune is running" in done.stderr
        run(store.root, "prune", "--dry-run", "quay.io/*")


def test_a_person_reads_what_went(store: Store) -> None:
    lines = run(store.root, "prune", "quay.io/team/old:v1").stdout.splitlines()
    assert lines[0].startswith(f"removed quay.io/team/old:v1@{OLD.digest}, last used ")
    assert lines[1].startswith("removed 1 image, 1 manifest, 2 blobs: ")
    lines = run(store.root, "prune", "--dry-run", "quay.io/team/old:v1").stdout.splitlines()
    assert lines[0].startswith("would remove nothing: 0 bytes")


@pytest.mark.parametrize("pattern", ["new:v1", "new", "docker.io/library/new", "docker.io/new:*w*"])
def test_a_name_means_the_images_that_list_shows_for_it(store: Store, pattern: str) -> None:
    shown = run(store.root, "list", "--format", "refs", pattern).stdout.split()
    assert prune(store.root, pattern, "--keep-recent", "0").images == shown
    assert bool(shown) is ("*" not in pattern)


def test_a_pattern_that_no_image_fits_is_named(store: Store) -> None:
    done = run(store.root, "prune", "quay.io/team/odl:*", "quay.io/team/other:*")
    assert done.stderr == "nothing matches 'quay.io/team/odl:*'\n"
    assert "removed 1 image" in done.stdout


def test_the_images_that_were_removed_last_are_written_down_with_the_reason(store: Store) -> None:
    prune(store.root, "*", "--unused-for", "30d", "--dry-run")
    assert read_removed(store) == []
    prune(store.root, "*", "--unused-for", "50d")
    (old,) = read_removed(store)
    assert (old.reference, old.reason) == ("quay.io/team/old:v1", "prune by an operator")
    assert old.size == sum(each.size for each in OLD.all_content())
    assert time.time() - old.last_used == pytest.approx(60 * DAY, abs=600)

    # The last fifty stay; a damaged file is begun anew.
    many = [replace(old, reference=f"quay.io/team/{number}:v1") for number in range(50)]
    add_removed(store, many[:49], store.staging.root)
    assert [each.reference for each in read_removed(store)] == [
        each.reference for each in (old, *many[:49])
    ]
    add_removed(store, many[49:], store.staging.root)
    assert read_removed(store) == many
    for text in ("", "{}", '[{"at": 1}]', "[null]", "[" * 100_000):
        (store.root / "removed.json").write_text(text)
        assert read_removed(store) == []
    prune(store.root, "*", "--unused-for", "30d")
    assert [each.reference for each in read_removed(store)] == ["quay.io/team/other:v1"]


def test_a_prune_that_fails_half_way_has_written_down_what_it_removed(store: Store) -> None:
    left = store.root / "quarantine" / "left"
    left.parent.mkdir()
    left.write_bytes(b"damaged")
    survey, selection = Survey(store), Selection(unreferenced=False, unused_for=50 * DAY)
    plan = make_plan(store, survey, selection, is_pinned=lambda *_: False, now=time.time())
    plan.rubbish = [StoredFile.of(left, left.stat())]
    left.unlink()
    left.parent.rmdir()
    left.parent.write_text("no folder")
    with store.removals.remover() as remover, pytest.raises(StoreError):
        carry_out(store, survey, plan, remover, keep_recent=0)
    assert [each.reference for each in read_removed(store)] == ["quay.io/team/old:v1"]


def test_a_prune_that_has_lost_its_turn_writes_over_nothing_of_the_next_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped while it reads what it will add to."""
    path = store.root / "removed.json"
    os.mkfifo(path)
    writing = os.open(path, os.O_RDWR)
    first = forked.popen(command(store.root, "prune", "quay.io/team/old:v1"))
    try:
        files = Path(f"/proc/{first.pid}/fd")
        end = time.monotonic() + 60
        while not any(each.is_symlink() and each.readlink() == path for each in files.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        path.unlink()
        monkeypatch.setattr(removal, "STOPPED", 1.0)
        survey, selection = Survey(store), Selection(patterns=("quay.io/team/other:v1",))
        plan = make_plan(store, survey, selection, is_pinned=lambda *_: False, now=time.time())
        with store.removals.remover() as remover:
            carry_out(store, survey, plan, remover, keep_recent=0)
        store.usage.record(7, Usage(), freed=0, stuck=False)
        first.send_signal(signal.SIGCONT)
        os.write(writing, b"[]")
        os.close(writing)
        assert first.wait(60) == 0
    finally:
        first.kill()
    assert [each.reference for each in read_removed(store)] == ["quay.io/team/other:v1"]
    assert (store.usage.read() or Usage()).runs == 1  # it knew the size before the next one


def test_a_plan_takes_little_memory_for_each_manifest(tmp_path: Path) -> None:
    """So that of a store of 100,000 takes some 60 MB, beside what each command takes."""
    many = Many(manifests=1000, blobs=200)
    make_store(tmp_path / "many", many)
    store = Store(tmp_path / "many")
    plan_of(store)  # what is made once
    tracemalloc.start()
    try:
        survey, plan = plan_of(store)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan.images) == many.images
    assert len(plan.manifests) == len(survey.manifests)
    assert taken < 900 * len(plan.manifests)


def plan_of(store: Store) -> tuple[Survey, Plan]:
    survey, selection = Survey(store), Selection(to_size=0, keep_recent=0)
    return survey, make_plan(store, survey, selection, is_pinned=lambda *_: False, now=time.time())


def test_a_file_with_the_largest_inode_is_kept_in_mind(tmp_path: Path) -> None:
    """Some network file systems use all 64 bits."""
    files = StoredFiles()
    files["a"] = each = StoredFile(f"{tmp_path}/a", 7, 2**64 - 1, -1, 10**18)
    assert files["a"] == each
    assert files.only(["a"]).total() == 7
