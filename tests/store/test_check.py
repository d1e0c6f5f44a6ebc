"""What is wrong in a store, by image."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from ociproxy.oci.digest import Digest
from ociproxy.store.check import Findings, check, check_quickly
from ociproxy.store.damage import FileCheck
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests.images import artifact, image, image_of, layer, multi_platform
from tests.parts.tools import run
from tests.server import ROOT
from tests.stores import damage, put, stored

READ_ONCE = ("img", "fat", "refs")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def checked(store: Store, *, quick: bool = False) -> Findings:
    files = FileCheck(store, quick=quick)
    if quick:
        return check_quickly(store, files)
    files.run()
    return check(store, files.damaged, files.unsealed)


def broken(found: Findings) -> dict[str, list[str]]:
    return {str(each.reference): [str(f.digest) for f in each.faults] for each in found.broken}


def is_whole(found: Findings) -> bool:
    return not (found.broken or found.nowhere or found.damaged_records)


def record(store: Store, *parts: str) -> Path:
    return store.root.joinpath("refs", *parts)


def test_a_whole_store_has_no_findings(store: Store) -> None:
    put(store, "quay.io/a/b:1", multi_platform())
    put(store, "quay.io/c:2", image(docker=True))
    found = checked(store)
    assert (is_whole(found), found.images) == (True, 2)


def test_one_of_300_blobs_is_named_with_its_images(store: Store) -> None:
    shared = layer({"shared": b"base"})
    for number in range(6):
        layers = [layer({f"own-{number}-{each}": b"x"}) for each in range(49)]
        layers += [shared] if number % 3 == 0 else []
        put(store, f"quay.io/team/app{number}:1", image_of(layers))
    assert len(list((store.root / "blobs").iterdir())) == 301
    damage(stored(store, shared.content), 5)
    found = checked(store)
    references = ["quay.io/team/app0:1", "quay.io/team/app3:1"]
    assert broken(found) == {name: [shared.content.digest] for name in references}
    assert all(each.damaged for each in found.broken)
    [(file, hit)] = found.hit.items()
    assert (file, list(map(str, hit))) == (f"blobs/{shared.content.encoded}", references)


@pytest.mark.parametrize("part", ["config", "layer"])
def test_a_blob_that_is_not_stored_is_missing_and_not_damaged(store: Store, part: str) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    blob = made.blobs[0] if part == "config" else made.layers[0]
    stored(store, blob).unlink()
    [only] = checked(store).broken
    assert (only.damaged, [str(each) for each in only.faults]) == (
        False,
        [f"{blob.digest} ({part} not stored)"],
    )


def test_a_tag_that_leads_nowhere_is_an_image_without_its_manifest(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    stored(store, made.top).unlink()
    found = checked(store)
    assert broken(found) == {"quay.io/a/b:1": [made.digest]}
    assert found.nowhere == []  # the record of the manifest is said with the image


def test_a_damaged_manifest_is_damage_of_its_image(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    damage(stored(store, made.top), 3)
    found = checked(store)
    [only] = found.broken
    assert (str(only.reference), only.damaged) == ("quay.io/a/b:1", True)
    assert list(found.hit) == [f"img/{made.top.encoded}"]


def test_a_damaged_child_is_no_platform_that_was_left_out(store: Store) -> None:
    """`list` takes it for one, for the bytes of a damaged manifest count for none."""
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    damage(stored(store, made.manifests[1]))
    [entry] = inventory(store)
    assert entry.complete
    assert broken(checked(store)) == {"quay.io/a/b:1": [made.manifests[1].digest]}


def test_a_child_in_quarantine_is_missed(store: Store) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    child = stored(store, made.manifests[1])
    store.quarantine.mkdir()
    child.rename(store.quarantine / child.name)
    found = checked(store)
    assert broken(found) == {"quay.io/a/b:1": [made.manifests[1].digest]}
    assert not found.broken[0].damaged


def test_a_platform_that_was_left_out_is_none(store: Store) -> None:
    made = multi_platform()
    put(store, "quay.io/a/b:1", made)
    child = made.manifests[1]
    stored(store, child).unlink()
    record(store, "quay.io", "a/b", "_manifests", child.digest).unlink()
    assert is_whole(checked(store))


def test_an_image_by_digest_whose_manifest_is_damaged_is_named(store: Store) -> None:
    made = image()
    put(store, f"quay.io/a/b@{made.digest}", made)
    damage(stored(store, made.top))
    assert broken(checked(store)) == {f"quay.io/a/b@{made.digest}": [made.digest]}


def test_the_content_of_referrers_is_looked_at(store: Store) -> None:
    made = image()
    bill = artifact(made.top, data=b"bill")
    signature = artifact(bill.top, data=b"signature")
    for each in (made, bill, signature):
        tag = ":1" if each is made else f"@{each.digest}"
        put(store, f"quay.io/a/b{tag}", each)
    payload = signature.blobs[-1]
    damage(stored(store, payload))
    found = checked(store)
    assert found.images == 3
    assert broken(found) == {f"quay.io/a/b@{signature.digest}": [payload.digest]}


def test_records_that_lead_nowhere_are_named(store: Store) -> None:
    made = image()
    signature = artifact(made.top, data=b"signature")
    put(store, "quay.io/a/b:1", made)
    put(store, f"quay.io/a/b@{signature.digest}", signature)
    stored(store, signature.top).unlink()
    found = checked(store)
    assert broken(found) == {}
    assert {each.path.relative_to(store.root).parts[0] for each in found.nowhere} == {
        "refs",
        "referrers",
    }


def test_records_that_cannot_be_read_are_damaged(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    signature = artifact(made.top)
    put(store, f"quay.io/a/b@{signature.digest}", signature)
    other = image("other")
    put(store, f"quay.io/a/b@{other.digest}", other)
    records = (
        record(store, "quay.io", "a/b", "_tags", "1"),
        record(store, "quay.io", "a/b", "_manifests", other.digest),
        store.root / "referrers" / made.digest / signature.digest,
    )
    records[0].write_bytes(b"")
    records[1].write_text(json.dumps(made.top.descriptor()))  # of another manifest
    records[2].write_text("{}")
    assert {each.path for each in checked(store).damaged_records} == set(records)


def test_a_blob_of_the_wrong_size_without_a_seal_is_damaged_for_quick(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    path = stored(store, made.layers[0])
    path.write_bytes(path.read_bytes()[:-1])
    [only] = checked(store, quick=True).broken
    assert only.damaged


def test_what_arrives_is_no_finding(store: Store) -> None:
    made = image(layers=2)
    put(store, "quay.io/a/b:1", made)
    blob = Digest.parse(made.layers[0].digest)
    for each in made.layers:
        stored(store, each).unlink()
    arriving = store.staging.lead(blob)
    assert arriving is not None
    found = checked(store)
    assert (is_whole(found), found.arriving) == (True, 1)
    arriving.close()


def test_what_no_process_fetches_any_more_is_missing(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    stored(store, made.layers[0]).unlink()
    left = store.staging.root / made.layers[0].encoded
    left.write_bytes(b"half")
    assert list(broken(checked(store))) == ["quay.io/a/b:1"]


def test_quick_finds_what_is_missing(store: Store) -> None:
    made = image()
    put(store, "quay.io/a/b:1", made)
    stored(store, made.blobs[0]).unlink()
    assert list(broken(checked(store, quick=True))) == ["quay.io/a/b:1"]


def test_quick_says_the_same_of_manifests_and_records_as_a_whole_check(store: Store) -> None:
    for number in range(6):
        put(store, f"quay.io/a/b{number}:1", multi_platform(f"each-{number}"))
    other = multi_platform("each-1")
    damage(stored(store, other.manifests[1]))
    child = stored(store, multi_platform("each-2").manifests[1])
    store.quarantine.mkdir()
    child.rename(store.quarantine / child.name)
    stored(store, multi_platform("each-3").layers[0]).unlink()
    stored(store, multi_platform("each-4").top).unlink()
    record(store, "quay.io", "a", "b5", "_tags", "broken").write_text("{")
    whole, quick = checked(store), checked(store, quick=True)
    assert quick == whole
    assert (len(whole.broken), len(whole.damaged_records)) == (4, 1)
    assert list(whole.hit) == [f"img/{other.manifests[1].encoded}"]


def test_quick_finds_damage_that_no_image_leads_to(store: Store) -> None:
    put(store, "quay.io/a/b:1", image())
    lone = image("lone")
    path = store.root / "img" / lone.top.encoded
    path.write_bytes(lone.top.data + b" ")
    files = FileCheck(store, quick=True)
    check_quickly(store, files)
    assert (list(files.damaged), files.manifests) == ([f"img/{lone.top.encoded}"], 2)


def test_quick_opens_each_manifest_and_record_once(store: Store) -> None:
    """Of a store of 100,000 manifests that is the most of the time."""
    for number in range(6):
        put(store, f"quay.io/a/b{number}:1", multi_platform(f"each-{number}"))
    program = (
        "import collections, sys\n"
        "opened = collections.Counter()\n"
        "sys.addaudithook(lambda name, args: name == 'open' and opened.update([str(args[0])]))\n"
        "from pathlib import Path\n"
        "from ociproxy.store.check import check_quickly\n"
        "from ociproxy.store.damage import FileCheck\n"
        "from ociproxy.store.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "opened.clear()\n"
        "check_quickly(store, FileCheck(store, quick=True))\n"
        "print(*opened.elements(), sep='\\n')\n"
    )
    done = run(sys.executable, "-c", program, str(store.root), cwd=ROOT)
    opened = Counter(done.stdout.decode().splitlines())
    files = [path for path in store.root.rglob("*") if path.is_file()]
    read = [path for path in files if path.relative_to(store.root).parts[0] in READ_ONCE]
    assert {path: opened[str(path)] for path in read} == dict.fromkeys(read, 1)
