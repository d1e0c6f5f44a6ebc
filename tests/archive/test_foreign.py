"""Archives and layouts as other tools wrote them, and as ociproxy once did: `foreign/` has one of
each, small ones with content made for the purpose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from ociproxy.archive.bundle import Bundle
from ociproxy.archive.lock import read_lock
from ociproxy.errors import LayoutInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests import layouts
from tests.archive.importing import Import
from tests.archive.test_bundle import serving
from tests.images import OCI_MANIFEST, Image, artifact, content, image
from tests.server import Mirror
from tests.stores import put

FOREIGN = Path(__file__).with_name("foreign")
IMAGE = "sha256:aa19b5e344a26d05bfae32acb63323d5b36ab762e8d45d28bc9dd380df6082b9"
SIGNATURE = "sha256:62fa28247263e6630a6d067dec71ec33349765b3be3d4913a16e03748149d218"
SBOM = "sha256:b9c8f407dee6cc5866906a6022fee3bb51351df7e06bca400a65cb2db3d42e96"
TAG = IMAGE.replace(":", "-")


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


def test_the_documentation_names_each_of_them() -> None:
    """And says what it is read as, which the other tests here show."""
    document = Path(__file__).parents[2] / "docs" / "interop.md"
    named = re.findall(r"^\| `([^`]+)` \|", document.read_text("utf-8"), re.MULTILINE)
    files = {path.name.partition(".")[0] for path in FOREIGN.iterdir()}
    assert files <= set(named)


def packed(name: str) -> Path:
    return FOREIGN / f"{name}.tar.zst"


def unpacked(name: str, folder: Path) -> Path:
    """The archive as a plain tar, which is what a bundle is."""
    path = folder / f"{name}.tar"
    with packed(name).open("rb") as source, path.open("wb") as target:
        zstandard.ZstdDecompressor().copy_stream(source, target)
    return path


def tag_of(job: Import, name: str) -> str | None:
    """The digest of a tag in the store."""
    reference = Reference.parse(name)
    assert reference.tag is not None
    record = Store(job.store).refs.find_tag(reference.repository, reference.tag)
    return None if record is None else str(record.descriptor.digest)


def ociproxy(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ociproxy", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


OLD = "ociproxy-lock-without-platform"
SIGNED = "up.test/tiny/one"
HAULED = "127.0.0.1:26000/tiny/one"


def test_an_archive_of_ours_whose_lock_has_an_empty_platform_is_read(
    job: Import, tmp_path: Path
) -> None:
    old = unpacked(OLD, tmp_path)
    done = job.run(packed(OLD))
    assert (done.code, set(done.statuses.values())) == (0, {"imported"}), done.problems
    assert set(done.statuses) == {f"{SIGNED}:{tag}" for tag in ("v1", TAG, f"{TAG}.sig")}
    with serving(tmp_path, old) as mirror:
        assert mirror.manifest("up.test", "tiny/one", f"{TAG}.sig").digest == SIGNATURE
    assert ociproxy("diff", old, old).returncode == 0
    delta = tmp_path / "delta.tar"
    exported = ociproxy("export", "--image-path", job.store, delta, "--since", old)
    assert exported.returncode == 0, exported.stderr
    assert len(read_lock(delta).omitted) == len(read_lock(delta).contents) - 4  # all blobs


def test_what_a_signature_is_exported_in_can_be_read_again(job: Import, tmp_path: Path) -> None:
    assert job.run(packed(OLD)).code == 0
    archive = tmp_path / "again.tar"
    assert job.export(archive).returncode == 0
    assert b'""' not in archive.read_bytes().partition(b"contents")[0]
    other = Import(tmp_path / "other")
    assert other.run(archive).code == 0
    assert other.listed() == job.listed()
    assert ociproxy("diff", job.store, archive).returncode == 0


# Which entries of an index.json are images


def folder_of(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    # Python 3.13 warns of `extractall` without a filter, and the oldest 3.11 has none.
    subprocess.run(["tar", "-xf", unpacked(name, tmp_path), "-C", folder], check=True)
    return folder


def referrers(job: Import, repository: str) -> list[str]:
    place = Reference.parse(repository).repository
    return [str(d.digest) for d in Store(job.store).refs.referrers(place, Digest.parse(IMAGE))]


def warnings(mirror: Mirror, event: str) -> list[str]:
    return [line for line in mirror.log().splitlines() if event in line]


def test_the_children_of_an_index_that_oras_lists_are_no_images(job: Import) -> None:
    real = image("real")
    put(Store(job.store), "quay.io/t/multi:latest", real)
    done = job.run("--name", "quay.io/t/multi", packed("oras-layout"))
    assert (done.code, done.statuses) == (0, {"quay.io/t/multi:v1": "imported"}), done.problems
    job.check("quay.io/t/multi:latest", real)
    done = job.run("--name", "quay.io/t/multi:2", packed("oras-layout"))
    assert (done.code, done.statuses) == (0, {"quay.io/t/multi:2": "imported"}), done.problems


def test_a_tag_of_the_layout_counts_before_one_that_is_made_up(job: Import, tmp_path: Path) -> None:
    nameless, real = image("nameless"), image("real")
    made = {"": nameless, "latest": real}
    files = layouts.members(made, key=layouts.REF_NAME)
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files), "--name", "quay.io/t/x")
    assert done.code == 2
    assert "is quay.io/t/x:latest already" in done.problems[0]
    job.check("quay.io/t/x:latest", real)


@pytest.mark.parametrize("name", ["hauler-haul", "hauler-haul-with-marker", "hauler-store"])
def test_an_image_of_hauler_s_keeps_its_name_and_its_signature(
    job: Import, tmp_path: Path, name: str
) -> None:
    done = job.run(folder_of(name, tmp_path) if name == "hauler-store" else packed(name))
    tags = ("v1", f"{TAG}.sig")
    assert done.code == 0, done.problems
    assert done.statuses == {f"{HAULED}:{tag}": "imported" for tag in tags}
    assert tag_of(job, f"{HAULED}:v1") == IMAGE
    assert tag_of(job, f"{HAULED}:{TAG}.sig") == SIGNATURE
    assert referrers(job, HAULED) == [SBOM]


@pytest.mark.parametrize("archive", ["hauler-haul", "hauler-haul-with-marker"])
def test_a_bundle_of_hauler_s_serves_the_image_and_what_signs_it(
    tmp_path: Path, archive: str
) -> None:
    with serving(tmp_path, unpacked(archive, tmp_path)) as mirror:
        registry, name = HAULED.split("/", 1)
        assert mirror.manifest(registry, name, "v1").digest == IMAGE
        assert mirror.manifest(registry, name, f"{TAG}.sig").digest == SIGNATURE
        listed = mirror.get(f"/v2/{name}/referrers/{IMAGE}?ns={registry}").json()["manifests"]
        assert [each["digest"] for each in listed] == [SBOM]
        assert warnings(mirror, "not served") == []


def test_what_cosign_saved_has_its_signature_under_its_tag(job: Import) -> None:
    done = job.run("--name", f"{SIGNED}:v1", packed("cosign-save"))
    assert done.code == 0, done.problems
    assert tag_of(job, f"{SIGNED}:v1") == IMAGE
    assert tag_of(job, f"{SIGNED}:{TAG}.sig") == SIGNATURE
    assert len(job.listed()) == 2


def test_an_artifact_never_takes_the_name_of_its_image(job: Import, tmp_path: Path) -> None:
    made = image()
    sbom = artifact(made.top)
    index = layouts.index_json([("quay.io/t/x:1", sbom.top), ("quay.io/t/x:1", made.top)])
    files = dict(layouts.members({"quay.io/t/x:1": made, "b": sbom})) | {"index.json": index}
    archive = layouts.write_tar(tmp_path / "x.tar", files.items())
    done = job.run(archive)
    assert (done.code, done.statuses) == (0, {"quay.io/t/x:1": "imported"}), done.problems
    assert tag_of(job, "quay.io/t/x:1") == made.digest
    job.check(f"quay.io/t/x@{sbom.digest}", sbom)
    with serving(tmp_path, archive) as mirror:
        assert mirror.manifest("quay.io", "t/x", "1").digest == made.digest
        listed = mirror.get(f"/v2/t/x/referrers/{made.digest}?ns=quay.io").json()["manifests"]
        assert [each["digest"] for each in listed] == [sbom.digest]


def test_a_signature_of_one_of_several_images_is_refused_by_name(
    job: Import, tmp_path: Path
) -> None:
    made = {"a": image("a"), "b": image("b"), "c": image("c")}
    entries = [each.top.descriptor() for each in made.values()]
    entries[1]["annotations"] = {"kind": "dev.cosignproject.cosign/sigs"}
    index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    files = dict(layouts.members(made)) | {"index.json": index}
    done = job.run("--name", "quay.io/t/x", layouts.write_tar(tmp_path / "x", files.items()))
    assert done.code == 5
    assert any("kind sigs: the archive does not say of which of 2" in p for p in done.problems)
    assert tag_of(job, "quay.io/t/x:latest") == made["a"].digest


def test_of_two_images_of_one_name_import_and_bundle_take_the_first(
    job: Import, tmp_path: Path
) -> None:
    done = job.run(packed("same-name-twice"))
    assert done.code == 5
    assert tag_of(job, "quay.io/t/x:v1") == IMAGE
    assert any("is quay.io/t/x:v1 already" in problem for problem in done.problems)
    with serving(tmp_path, unpacked("same-name-twice", tmp_path)) as mirror:
        assert mirror.manifest("quay.io", "t/x", "v1").digest == IMAGE
        [line] = warnings(mirror, "images of a bundle not served")
        assert "is quay.io/t/x:v1 already" in line


def test_a_bundle_says_which_images_have_no_full_name(tmp_path: Path) -> None:
    with serving(tmp_path, unpacked("oras-layout", tmp_path)) as mirror:
        [line] = warnings(mirror, "images of a bundle not served")
        assert "images=1 first=v1" in line
        assert "--name" in line


def test_the_tag_of_a_signature_is_kept_whatever_tag_the_image_is_given(
    job: Import, tmp_path: Path
) -> None:
    """As regctl and `cosign` lay them out: by tags that the digest of the image is in."""
    made, signature = image(), image("signature")
    tag = f"{made.digest.replace(':', '-')}.sig"
    files = layouts.members({"v1": made, tag: signature}, key=layouts.REF_NAME)
    done = job.run("--name", "quay.io/t/x:2", layouts.write_tar(tmp_path / "x.tar", files))
    assert done.code == 0, done.problems
    assert set(done.statuses) == {"quay.io/t/x:2", f"quay.io/t/x:{tag}"}


def test_a_referrer_that_has_a_name_too_is_listed_by_a_bundle(tmp_path: Path) -> None:
    made = image()
    sbom = artifact(made.top)
    for also in ([], [("", sbom.top)]):
        index = layouts.index_json(
            [("quay.io/t/x:1", made.top), ("quay.io/t/x:s", sbom.top), *also]
        )
        files = dict(layouts.members({"a": made, "b": sbom})) | {"index.json": index}
        with Bundle(layouts.write_tar(tmp_path / "x.tar", files.items())) as bundle:
            refs = Store(tmp_path / "store", below=[bundle]).refs
            repository = Reference.parse("quay.io/t/x").repository
            listed = refs.referrers(repository, Digest.parse(made.digest))
            assert [str(each.digest) for each in listed] == [sbom.digest]
            assert refs.tags(repository) == ["1", "s"]


def with_names(tmp_path: Path, *names: str, key: str = layouts.IMAGE_NAME) -> Path:
    """One image in a layout that lists it by each of the names."""
    made = image("named")
    index = layouts.index_json([(name, made.top) for name in names], key=key)
    files = dict(layouts.members({"": made})) | {"index.json": index}
    return layouts.write_tar(tmp_path / "x.tar", files.items())


def test_what_containerd_calls_an_image_for_itself_is_no_name(job: Import, tmp_path: Path) -> None:
    """As `ctr -n k8s.io images export` lists all that a node has."""
    digest = image("named").digest
    made_up = [f"sha256:{'5' * 64}", f"import-2026-11-28@{digest}", "import-2026-11-28:v1"]
    given = ["quay.io/t/x:1", f"quay.io/t/x@{digest}"]
    archive = with_names(tmp_path, *made_up, *given)
    done = job.run(archive)
    assert (done.code, done.statuses) == (0, dict.fromkeys(given, "imported")), done.problems
    assert set(job.listed()) == {"quay.io/t/x:1"}
    with serving(tmp_path, archive) as mirror:
        assert mirror.manifest("quay.io", "t/x", "1").digest == digest
        assert mirror.manifest("docker.io", "library/sha256", "5" * 64).status == 404
        assert warnings(mirror, "not served") == []


@pytest.mark.parametrize(
    ("made_up", "given", "expected"),
    [
        (f"sha256:{'5' * 64}", "quay.io/t/x:1", "quay.io/t/x:1"),
        ("import-2026-11-28:v1", "quay.io/t/x", "quay.io/t/x:v1"),
    ],
)
def test_an_image_that_only_containerd_named_needs_a_name(
    job: Import, tmp_path: Path, made_up: str, given: str, expected: str
) -> None:
    archive = with_names(tmp_path, made_up)
    assert job.run(archive).code == 2
    assert job.run("--name", given, archive).statuses == {expected: "imported"}


def test_crane_s_mark_of_a_digest_is_no_tag(job: Import, tmp_path: Path) -> None:
    digest = image("named").digest
    done = job.run(with_names(tmp_path, "quay.io/t/x:i-was-a-digest"))
    assert (done.code, done.statuses) == (0, {f"quay.io/t/x@{digest}": "imported"})


def test_a_version_that_cannot_be_a_tag_is_said(job: Import, tmp_path: Path) -> None:
    archive = with_names(tmp_path, "1.0.0+build", key=layouts.REF_NAME)
    for words in ((), ("--name", "quay.io/t/x")):
        done = job.run(archive, *words)
        assert done.code == 2
        assert "'1.0.0+build'" in done.problems[0]
    assert job.run(archive, "--name", "quay.io/t/x:1").statuses == {"quay.io/t/x:1": "imported"}


# Layers that need not be distributed

BASE = "quay.io/t/f:v1"
FOREIGN_LAYER = "9125536a6f0f8812050f7a81a0da3c18986c1b22bb31663dd3592cd2185d04ff"


@pytest.mark.parametrize("folder", [True, False])
def test_a_foreign_layer_that_is_there_is_kept_and_exported(
    job: Import, tmp_path: Path, folder: bool
) -> None:
    source = folder_of("foreign-layer", tmp_path) if folder else packed("foreign-layer")
    done = job.run("--name", "quay.io/t/f", source)
    assert (done.code, done.statuses) == (0, {BASE: "imported"}), done.problems
    assert FOREIGN_LAYER in job.blobs()
    assert job.export(tmp_path / "out.tar").returncode == 0
    other = Import(tmp_path / "other")
    assert other.run(tmp_path / "out.tar").code == 0
    assert FOREIGN_LAYER in other.blobs()
    assert other.listed() == {BASE: True}


def test_a_foreign_layer_that_is_not_there_is_named_and_the_image_is_not_called_complete(
    job: Import, tmp_path: Path
) -> None:
    layout = folder_of("foreign-layer", tmp_path)
    (layout / "blobs" / "sha256" / FOREIGN_LAYER).unlink()
    done = job.run("--name", "quay.io/t/f", layout)
    assert done.code == 0
    [event] = [each for each in done.events if each["event"] == "image"]
    assert event["leftOut"] == [f"the non-distributable layer sha256:{FOREIGN_LAYER}"]
    assert job.listed() == {BASE: False}
    exported = job.export(tmp_path / "out.tar")
    assert exported.returncode == 3
    assert (
        f"sha256:{FOREIGN_LAYER} (non-distributable layer not stored)" in exported.stderr.decode()
    )


def test_an_ordinary_layer_is_not_dispensable_because_it_has_urls(
    job: Import, tmp_path: Path
) -> None:
    made = image(layers=2)
    document = made.top.json()
    document["layers"][1]["urls"] = ["https://elsewhere.example/"]
    top = content(json.dumps(document).encode(), OCI_MANIFEST)
    files = layouts.members({BASE: Image(top, blobs=made.blobs)}, without=[made.layers[1]])
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files))
    assert (done.code, done.statuses) == (5, {BASE: "incomplete"})


# What is refused in words that say what to do


def test_a_tar_of_imgpkg_s_is_called_so(job: Import) -> None:
    done = job.run(packed("imgpkg"))
    assert done.code == 5
    assert [event["event"] for event in done.events] == ["failed", "done"]
    assert "imgpkg copy --tar FILE --to-repo" in done.problems[0]


@pytest.mark.parametrize("folder", [True, False])
def test_what_skopeo_writes_as_dir_is_called_so(job: Import, tmp_path: Path, folder: bool) -> None:
    made = image()
    files = {
        "manifest.json": made.top.data,
        "version": b"Directory Transport Version: 1.1\n",
        **{each.encoded: each.data for each in made.blobs},
    }
    write = layouts.write_folder if folder else layouts.write_tar
    done = job.run(write(tmp_path / "x", files.items()))
    assert done.code == 5
    assert "skopeo copy dir:FOLDER oci-archive:" in done.problems[0]


@pytest.mark.parametrize("folder", [True, False])
def test_blobs_that_no_entry_leads_to_are_not_an_import_of_nothing(
    job: Import, tmp_path: Path, folder: bool
) -> None:
    empty = layouts.index_json([])
    files = dict(layouts.members({"quay.io/t/x:1": image()})) | {"index.json": empty}
    write = layouts.write_folder if folder else layouts.write_tar
    source = write(tmp_path / "x", files.items())
    done = job.run(source)
    assert done.code == 5
    assert "lists no image" in done.problems[0]
    if not folder:
        with pytest.raises(LayoutInvalid, match="lists no image"):
            Bundle(source)


def test_a_layer_that_is_a_symbolic_link_is_called_so(job: Import, tmp_path: Path) -> None:
    """As `crane pull --format oci` makes of a cache."""
    made = image()
    layout = layouts.write_folder(tmp_path / "x", layouts.members({"quay.io/t/x:1": made}))
    blob = layout / layouts.blob_path(made.layers[0])
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    done = job.run(layout)
    assert done.code == 5
    assert "is a symbolic link: not followed" in done.problems[0]
