"""Hostile archives: refused in one line, with no image visible and no file outside the store."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociproxy.archive.importer.importer import Importer, Rules
from ociproxy.archive.importer.results import ImportResult
from ociproxy.errors import OciProxyError
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests import images, layouts
from tests.archive.importing import Done, Import

NAME = "quay.io/team/app:1"
IMAGE = images.image("hostile", layer_size=50_000)
PATHS = {what: layouts.blob_path(each) for what, each in {"layer": IMAGE.layers[0]}.items()}


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path / "job")


def archive(path: Path, *more: tarfile.TarInfo, first: bool = False) -> Path:
    """A good archive with members before or after."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        if first:
            for info in more:
                tar.addfile(info)
        for name, data in layouts.members({NAME: IMAGE}):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if not first:
            for info in more:
                tar.addfile(info)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def refused(job: Import, done: Done, said: str) -> None:
    assert done.code == 5
    assert said in done.problems[0]
    assert len(done.problems) == 1
    assert job.listed() == {}
    assert list((job.store / "pulls").iterdir()) == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("info", "said"),
    [
        (member("../../outside"), "leads out of the archive"),
        (member("/tmp/outside"), "leads out of the archive"),
        (member("x", tarfile.SYMTYPE, "/etc/passwd"), ""),
        (member("dev", tarfile.CHRTYPE), "is a device"),
        (member("pipe", tarfile.FIFOTYPE), "is a pipe"),
        (member("sparse", tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    ],
)
def test_what_no_tool_writes_refuses_the_archive(
    job: Import, tmp_path: Path, info: tarfile.TarInfo, said: str, first: bool
) -> None:
    done = job.run(archive(tmp_path / "x.tar", info, first=first))
    if not said:  # a link that nothing asks for is nobody's business
        assert done.code == 0
        return
    refused(job, done, said)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", "../../index.json"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_blob_that_is_a_link_is_no_blob(
    job: Import, tmp_path: Path, target: str, kind: bytes
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in layouts.members({NAME: IMAGE}):
            info = member(name)
            if name == PATHS["layer"]:
                info.type, info.linkname = kind, target
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    done = job.run(path)
    refused(job, done, "is a link in the archive, which is not followed")


@pytest.mark.parametrize("name", ["oci-layout", "index.json", "manifest.json"])
def test_a_document_that_is_a_link_refuses_the_archive(
    job: Import, tmp_path: Path, name: str
) -> None:
    info = member(name, tarfile.SYMTYPE, "/etc/passwd")
    path = tmp_path / "x.tar"
    files = ((n, d) for n, d in layouts.members({NAME: IMAGE}) if n != name)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + layouts.tar_bytes(files))
    refused(job, job.run(path), f"{name} is a link")


def test_a_bomb_is_refused(job: Import, tmp_path: Path) -> None:
    size = 400 * 1024 * 1024
    info = member(PATHS["layer"])
    info.size = size
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as bomb:
        bomb.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // (4 * 1024 * 1024)):
            bomb.write(bytes(4 * 1024 * 1024))
    refused(job, job.run(tmp_path / "x.tar.gz"), "refused as a bomb")


def test_names_do_not_fill_the_memory(job: Import, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(700):
            info = member(f"{number}/" + "x" * 60_000, tarfile.SYMTYPE, "y")
            tar.addfile(info)
    refused(job, job.run(path), "names that are too long")


def test_what_it_may_expand_to_can_be_bounded(job: Import, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar")
    refused(job, job.run(path, "--max-size", "10KiB"), "see --max-size")
    assert job.run(path, "--max-size", "1MiB").code == 0


@pytest.mark.parametrize("size", ["0", "many", "-1", "1 TiB"])
def test_a_bound_that_is_none_is_a_mistake(job: Import, tmp_path: Path, size: str) -> None:
    done = job.run(archive(tmp_path / "x.tar"), "--max-size", size)
    assert done.code == 2
    assert "--max-size" in done.stderr


def test_a_manifest_that_is_too_large_is_none(job: Import, tmp_path: Path) -> None:
    large = images.image("large", pad_to=4 * 1024 * 1024 + 1)
    done = job.run(layouts.write_tar(tmp_path / "x.tar", layouts.members({NAME: large})))
    refused(job, done, large.digest)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"manifests": [1]}', "descriptor is not an object"),
        (b'{"manifests": [{"digest": "md5:00", "mediaType": "x", "size": 1}]}', "digest"),
        (b" " * (16 * 1024 * 1024 + 1), "larger than"),
    ],
)
def test_an_index_that_is_none_refuses_the_archive(
    job: Import, tmp_path: Path, document: bytes, said: str
) -> None:
    files = dict(layouts.members({NAME: IMAGE})) | {"index.json": document}
    refused(job, job.run(layouts.write_tar(tmp_path / "x.tar", files.items())), said)


def test_a_layer_may_not_pose_as_a_manifest(job: Import, tmp_path: Path) -> None:
    """`index.json` calls an image manifest an index: nothing would have to be there."""
    lie = images.Content(images.OCI_INDEX, IMAGE.top.data, IMAGE.top.digest)
    files = dict(layouts.members({NAME: IMAGE}))
    files["index.json"] = layouts.index_json([(NAME, lie)])
    done = job.run(layouts.write_tar(tmp_path / "x.tar", files.items()))
    refused(job, done, "but described as")


@pytest.mark.parametrize(
    "lock", [b"", b"{}", b'{"format": "ociproxy-lock/1", "contents": [{"digest": "x"}]}']
)
def test_a_lock_that_is_none_refuses_the_archive(job: Import, tmp_path: Path, lock: bytes) -> None:
    files = [("ociproxy-lock.json", lock), *layouts.members({NAME: IMAGE})]
    refused(job, job.run(layouts.write_tar(tmp_path / "x.tar", files)), "lock")


@pytest.mark.parametrize(
    "label",
    [
        {"volume": 0, "volumes": 1},
        {"volume": 2, "volumes": 1},
        {"volume": 1, "volumes": 10**9},
        {"volume": "1", "volumes": 1},
        {},
    ],
)
def test_a_volume_that_says_nonsense_is_refused(
    job: Import, tmp_path: Path, label: dict[str, object]
) -> None:
    raw = json.dumps({"format": "ociproxy-volume/1", "set": "x", **label}).encode()
    files = [("ociproxy-volume.json", raw), *layouts.members({NAME: IMAGE})]
    refused(job, job.run(layouts.write_tar(tmp_path / "x.tar", files)), "ociproxy-volume.json")


class Quiet:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[ImportResult] = []

    def image(self, outcome: ImportResult) -> None:
        self.outcomes.append(outcome)

    def note(self, source: str, text: str) -> None:
        pass

    def failed(self, source: str, error: OciProxyError) -> None:
        pass


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_bytes_are_flipped_only_whole_images_are_visible(
    tmp_path: Path, data: st.DataObject
) -> None:
    small = images.image("small")
    raw = bytearray(layouts.tar_bytes(layouts.members({NAME: small, "a.io/b:1": small})))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.tar"
    path.write_bytes(raw)
    store = Store(tmp_path / f"store-{data.draw(st.uuids())}")
    Importer(store, Rules(), Quiet()).run([path])
    for entry in inventory(store):
        holder = store.manifests.find(entry.digest)
        assert holder is not None
        for blob in images_blobs(holder.raw):
            assert (store.root / "blobs" / blob).exists()
    assert list(store.staging.root.iterdir()) == []


@pytest.mark.parametrize("says", [True, False])
def test_an_image_that_is_called_something_else_is_not_published(
    tmp_path: Path, says: bool
) -> None:
    """As an unknown document it would be whole without its layers."""
    document = IMAGE.top.json()
    if not says:
        del document["mediaType"]
    raw = json.dumps(document).encode()
    made = images.Image(images.content(raw, "application/vnd.oci.image_manifest"), (), IMAGE.blobs)
    path = layouts.write_tar(tmp_path / "x.tar", layouts.members({NAME: made}))
    store = Store(tmp_path / "store")
    Importer(store, Rules(), Quiet()).run([path])
    assert list(inventory(store)) == []
    assert list((store.root / "img").iterdir()) == []


@pytest.mark.parametrize("fields", [{"config": {"a": 1}}, {"layers": "none"}, {"schemaVersion": 3}])
def test_a_document_of_another_kind_is(tmp_path: Path, fields: dict[str, object]) -> None:
    made = images.Image(images.content(json.dumps(fields).encode(), "application/vnd.example+json"))
    path = layouts.write_tar(tmp_path / "x.tar", layouts.members({NAME: made}))
    store = Store(tmp_path / "store")
    Importer(store, Rules(), Quiet()).run([path])
    assert [entry.complete for entry in inventory(store)] == [True]


def images_blobs(raw: bytes) -> Iterable[str]:
    document = json.loads(raw)
    return [each["digest"][7:] for each in (document["config"], *document["layers"])]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.text(min_size=1, max_size=120))
def test_whatever_members_are_called_nothing_is_written_elsewhere(
    tmp_path: Path, name: str
) -> None:
    try:
        raw = layouts.tar_bytes([*layouts.members({NAME: IMAGE}), (name, b"payload")])
    except (ValueError, UnicodeError):
        return
    path = tmp_path / "x.tar"
    path.write_bytes(raw)
    store = Store(tmp_path / "store")
    before = set(tmp_path.iterdir())
    Importer(store, Rules(), Quiet()).run([path])
    assert set(tmp_path.iterdir()) == before
    stored = {each.name for each in (store.root / "blobs").iterdir()}
    assert stored <= {each.encoded for each in IMAGE.blobs}


def test_a_source_that_is_a_device_is_read_as_a_stream(job: Import) -> None:
    done = job.run(Path("/dev/null"))
    assert done.code == 5
    assert done.problems == ["/dev/null: is neither a tar nor a folder"]
