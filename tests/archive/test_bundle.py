"""Archives that are served as they are."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ociproxy.archive.bundle import Bundle
from ociproxy.archive.lock import read_lock
from ociproxy.archive.volumes import VolumeLabel, grouped
from ociproxy.errors import ConfigError, DigestMismatch, LayoutInvalid, StoreError
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Repository
from ociproxy.store.extract import Extractor
from ociproxy.store.store import Store
from tests import layouts
from tests.images import MIB, OCI_MANIFEST, Image, artifact, image, multi_platform
from tests.serve.multipart import parts_of
from tests.server import Mirror
from tests.stores import put
from tests.upstream import FakeUpstream

QUAY = "quay.io"


def export(tmp_path: Path, images: dict[str, Image], *args: object, name: str = "b.tar") -> Path:
    """An archive of these images, made by the product."""
    store = Store(tmp_path / f"store of {name}")
    for reference, made in images.items():
        put(store, reference, made)
    command = [sys.executable, "-m", "ociproxy", "export", "--image-path", str(store.root)]
    words = [str(tmp_path / name), *map(str, args)]
    subprocess.run([*command, *words], check=True, capture_output=True)
    if "--volume-size" not in words:
        read_lock(tmp_path / name)  # what is written is read again
    return tmp_path / name


@contextmanager
def serving(
    tmp_path: Path, *bundles: Path, offline: bool = True, **more: object
) -> Iterator[Mirror]:
    args = [word for bundle in bundles for word in ("--bundle", str(bundle))]
    mirror = Mirror(
        tmp_path / "mirror", more or None, args=[*args, *(["--offline"] if offline else [])]
    )
    mirror.start()
    try:
        yield mirror
        mirror.stop()
    finally:
        mirror.kill()


def pull(mirror: Mirror, reference: str, made: Image, repository: str = "a/b") -> None:
    """Everything of an image, byte for byte."""
    answer = mirror.manifest(QUAY, repository, reference)
    assert (answer.status, answer.body) == (200, made.top.data), answer.body
    assert answer.headers["content-type"] == made.top.media_type
    assert answer.digest == made.digest
    for each in made.manifests:
        assert mirror.manifest(QUAY, repository, each.digest).body == each.data
    for each in made.blobs:
        assert mirror.blob(QUAY, repository, each.digest).body == each.data


@pytest.mark.parametrize("docker", [False, True])
def test_an_archive_answers_by_tag_and_digest_without_an_upstream(
    tmp_path: Path, docker: bool
) -> None:
    made, other = multi_platform(docker=docker, layers=2), image("other", docker=docker)
    bundle = export(tmp_path, {"quay.io/a/b:1": made, f"quay.io/c@{other.digest}": other})
    with serving(tmp_path, bundle) as mirror:
        pull(mirror, "1", made)
        pull(mirror, made.digest, made)
        pull(mirror, other.digest, other, "c")
        assert mirror.manifest(QUAY, "a/b", "2").status == 404
        assert mirror.get(f"/v2/a/b/tags/list?ns={QUAY}").json()["tags"] == ["1"]
        assert mirror.get(f"/v2/unknown/tags/list?ns={QUAY}").status == 404
    assert list((mirror.store / "blobs").iterdir()) == []


def test_ranges_and_heads_are_cut_out_of_the_archive(tmp_path: Path) -> None:
    made = image(layer_size=MIB)
    layer = made.layers[0]
    with serving(tmp_path, export(tmp_path, {"quay.io/a/b:1": made})) as mirror:
        path = f"/v2/a/b/blobs/{layer.digest}?ns={QUAY}"
        head = mirror.head(path)
        assert (head.status, head.headers["content-length"]) == (200, str(layer.size))
        part = mirror.get(path, {"Range": "bytes=1000-1999"})
        assert (part.status, part.body) == (206, layer.data[1000:2000])
        tail = mirror.get(path, {"Range": "bytes=-10"})
        assert (tail.status, tail.body) == (206, layer.data[-10:])
        parts = parts_of(mirror.get(path, {"Range": "bytes=5-9,1000-1999"}))
        assert parts == [(5, 9, layer.data[5:10]), (1000, 1999, layer.data[1000:2000])]
        assert mirror.get(path, {"Range": f"bytes={layer.size}-"}).status == 416
        assert "hit" in mirror.get(path).cache_status


@pytest.mark.parametrize("media_type", [f"{OCI_MANIFEST}; charset=utf-8", "text/plain"])
def test_an_image_that_is_called_carelessly_is_served_as_what_it_is(
    tmp_path: Path, media_type: str
) -> None:
    made, other = image(layers=2), image("other")
    names = {"quay.io/a/b:1": layouts.called(made, media_type), "quay.io/c:1": other}
    bundle = layouts.write_tar(tmp_path / "b.tar", layouts.members(names))
    with serving(tmp_path, bundle) as mirror:
        pull(mirror, "1", names["quay.io/a/b:1"])
        pull(mirror, made.digest, made)
        pull(mirror, "1", other, "c")


def test_referrers_in_an_archive_are_listed(tmp_path: Path) -> None:
    made = image()
    sbom = artifact(made.top)
    signature = artifact(sbom.top, data=b"[]")
    images = {
        "quay.io/a/b:1": made,
        f"quay.io/a/b@{sbom.digest}": sbom,
        f"quay.io/a/b@{signature.digest}": signature,
    }
    with serving(tmp_path, export(tmp_path, images)) as mirror:
        for subject, referrer in ((made, sbom), (sbom, signature)):
            listed = mirror.get(f"/v2/a/b/referrers/{subject.digest}?ns={QUAY}").json()
            assert [each["digest"] for each in listed["manifests"]] == [referrer.digest]
        pull(mirror, signature.digest, signature)


def test_bundles_lie_over_each_other_and_under_the_store(tmp_path: Path) -> None:
    base, newer, own = image("base"), image("newer"), image("own")
    first = export(tmp_path, {"quay.io/a/b:1": base, "quay.io/a/b:2": base}, name="first.tar")
    images = {"quay.io/a/b:2": newer, "quay.io/a/b:3": newer}
    second = export(tmp_path, images, name="second.tar")
    put(Store(tmp_path / "mirror" / "store"), "quay.io/a/b:3", own)
    with serving(tmp_path, second, first) as mirror:
        pull(mirror, "1", base)
        pull(mirror, "2", newer)
        pull(mirror, "3", own)
        assert mirror.get(f"/v2/a/b/tags/list?ns={QUAY}").json()["tags"] == ["1", "2", "3"]


def test_a_delta_is_served_over_its_base(tmp_path: Path) -> None:
    old, shared = image("old"), image("shared", layer_size=MIB)
    base = export(tmp_path, {"quay.io/a/b:1": old, "quay.io/a/b:2": shared}, name="base.tar")
    new = image("new")
    images = {"quay.io/a/b:1": new, "quay.io/a/b:2": shared}
    delta = export(tmp_path, images, "--since", base, name="delta.tar")
    assert delta.stat().st_size < MIB
    with serving(tmp_path, delta, base) as mirror:
        pull(mirror, "1", new)
        pull(mirror, "2", shared)


def test_a_bundle_is_served_without_a_store_and_where_none_can_be_made(tmp_path: Path) -> None:
    made = image(layer_size=MIB)
    archive = export(tmp_path, {"quay.io/a/b:1": made})
    # Not even root can make a folder there.
    mirror = Mirror(
        tmp_path / "mirror",
        args=["--offline", "--bundle", str(archive)],
        store=Path("/proc/ociproxy-store"),
        env={"TMPDIR": str(tmp_path)},
    )
    try:
        mirror.start()
        pull(mirror, "1", made)
    finally:
        mirror.stop()
    assert list(tmp_path.glob("ociproxy-*")) == []


@pytest.mark.parametrize("isolation", ["none", "repository"])
def test_volumes_are_served_together(tmp_path: Path, isolation: str) -> None:
    made = image(layer_size=MIB, layers=3)
    export(tmp_path, {"quay.io/a/b:1": made}, "--volume-size", "1500K", name="v.tar")
    volumes = sorted(tmp_path.glob("v.*of*.tar"))
    assert len(volumes) == 3
    upstreams = [{"name": QUAY, "isolation": isolation}]
    with serving(tmp_path, *volumes[::-1], upstreams=upstreams) as mirror:
        pull(mirror, "1", made)


def test_the_volume_of_another_set_is_named() -> None:
    labels = {
        Path(f"{name}.0{number}of3.tar"): VolumeLabel(set_id, number, 3)
        for name, set_id, number in (("a", "x", 1), ("b", "y", 2), ("a", "x", 3))
    }
    with pytest.raises(ConfigError) as caught:
        grouped(labels)
    assert str(caught.value) == "b.02of3.tar: is volume 2 of another set than a.01of3.tar"


def test_a_volume_alone_is_refused(tmp_path: Path) -> None:
    made = image(layer_size=MIB, layers=3)
    export(tmp_path, {"quay.io/a/b:1": made}, "--volume-size", "1500K", name="v.tar")
    first, second, third = sorted(tmp_path.glob("v.*of*.tar"))
    done = refused_start(tmp_path, first, third)
    assert done.returncode == 2
    assert f"{first}: is one of 3 volumes; give volume 2 too" in done.stderr.decode()
    with serving(tmp_path, first, second, third) as mirror:
        pull(mirror, "1", made)


def test_a_delta_without_its_base_says_so(tmp_path: Path) -> None:
    shared = image("shared", layer_size=MIB)
    base = export(tmp_path, {"quay.io/a/b:2": shared}, name="base.tar")
    images = {"quay.io/a/b:1": image("new"), "quay.io/a/b:2": shared}
    delta = export(tmp_path, images, "--since", base, name="delta.tar")
    with serving(tmp_path, delta) as mirror:
        assert f"bundle without its base path={delta} missing=2 digest=sha256:" in mirror.log()
    with serving(tmp_path, delta, base) as mirror:
        assert mirror.log().count("without its base") == 1, "of the start before"


def test_several_workers_serve_one_archive(tmp_path: Path) -> None:
    made = multi_platform(layer_size=MIB)
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    with serving(tmp_path, bundle, serve={"workers": 2}) as mirror:
        for _ in range(6):
            pull(mirror, "1", made)


def test_a_bundle_in_the_config_file_is_relative_to_it(tmp_path: Path) -> None:
    made = image()
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    with serving(tmp_path, serve={"bundles": [f"../{bundle.name}"]}) as mirror:
        pull(mirror, "1", made)


async def test_with_an_upstream_the_tag_is_asked_for_and_the_blobs_are_not(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    made = image()
    upstream.add("team/app", made, tag="1")
    registry = upstream.registry
    bundle = export(tmp_path, {f"{registry}/team/app:1": made})
    config = {"upstreams": [{"name": registry, "scheme": "http"}]}
    args = ["--bundle", str(bundle)]
    mirror = Mirror(tmp_path / "mirror", config, args=args)
    mirror.start()
    try:
        answer = mirror.manifest(registry, "team/app", "1")
        assert answer.body == made.top.data
        assert mirror.blob(registry, "team/app", made.layers[0].digest).body == made.layers[0].data
        asked = [(each.method, each.path) for each in upstream.requests]
        assert asked == [("HEAD", "/v2/team/app/manifests/1")]
        mirror.stop()
    finally:
        mirror.kill()


def test_a_blob_is_verified_before_it_is_served(tmp_path: Path) -> None:
    made = image(layer_size=MIB, layers=2)
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    flip(bundle, made.layers[0].data[-1000:])
    with serving(tmp_path, bundle) as mirror:
        assert mirror.blob(QUAY, "a/b", made.layers[1].digest).body == made.layers[1].data
        for _ in range(2):
            assert mirror.blob(QUAY, "a/b", made.layers[0].digest).status == 404
        assert made.layers[0].digest in mirror.log()
        assert str(bundle) in mirror.log()


def test_an_archive_on_a_failing_disk_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = image("app")
    with Bundle(export(tmp_path, {"docker.io/a/b:1": made})) as bundle:

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        for name in ("pread", "preadv", "dup"):
            monkeypatch.setattr(os, name, fail)
        blob = Digest.parse(made.layers[0].digest)
        with pytest.raises(StoreError, match=r"b\.tar"):
            bundle.find_manifest(Digest.parse(made.digest))
        with pytest.raises(StoreError, match=r"b\.tar"):
            bundle.find_blob(blob)
        with pytest.raises(StoreError, match=r"b\.tar"):
            bundle.verify_blob(blob)


def test_another_bundle_has_what_is_damaged_in_one(tmp_path: Path) -> None:
    made = image(layer_size=MIB)
    bad = export(tmp_path, {"quay.io/a/b:1": made}, name="bad.tar")
    flip(bad, made.layers[0].data[-1000:])
    good = export(tmp_path, {"quay.io/a/b:1": made}, name="good.tar")
    with serving(tmp_path, bad, good) as mirror:
        answers = [mirror.blob(QUAY, "a/b", made.layers[0].digest) for _ in range(2)]
        assert answers[-1].body == made.layers[0].data
        assert all(each.body == made.layers[0].data for each in answers if each.status == 200)


def test_what_is_written_into_an_open_bundle_is_verified_again(tmp_path: Path) -> None:
    made = image(layer_size=MIB)
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    with serving(tmp_path, bundle) as mirror:
        assert mirror.blob(QUAY, "a/b", made.layers[0].digest).status == 200
        flip(bundle, made.layers[0].data[-1000:])
        assert mirror.blob(QUAY, "a/b", made.layers[0].digest).status == 404


def test_what_is_written_while_it_is_verified_is_verified_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = image(layer_size=3 * MIB)
    path = export(tmp_path, {"quay.io/a/b:1": made})
    layer, digest = made.layers[0], Digest.parse(made.layers[0].digest)
    read = os.preadv
    written: list[int] = []

    def sealed(bundle: Bundle) -> bool:
        found = bundle.find_blob(digest)
        assert found is not None
        found.file.close()
        return found.sealed

    with Bundle(path) as bundle:

        def read_and_write(file: int, buffers: list[memoryview], offset: int) -> int:
            count = read(file, buffers, offset)
            if not written:
                # Behind the hash, with a reader who sees that the file has changed.
                written.append(offset)
                flip(path, layer.data[:1000])
                assert not sealed(bundle)
            return count

        monkeypatch.setattr(os, "preadv", read_and_write)
        bundle.verify_blob(digest)
        assert not sealed(bundle)
        with pytest.raises(DigestMismatch):
            bundle.verify_blob(digest)


def test_a_bundle_that_is_replaced_is_served_on(tmp_path: Path) -> None:
    made = image(layer_size=MIB)
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    with serving(tmp_path, bundle) as mirror:
        export(tmp_path, {"quay.io/a/b:1": image("other")}, name="c.tar").replace(bundle)
        pull(mirror, "1", made)


# Damage at the start


def refused_start(tmp_path: Path, *bundles: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ociproxy", "serve", "--port", "0", "--offline"]
    given = [word for bundle in bundles for word in ("--bundle", bundle)]
    return subprocess.run(
        [*command, "--image-path", tmp_path / "s", *given],
        capture_output=True,
        timeout=30,
        check=False,
    )


def flip(path: Path, where: bytes) -> None:
    """One byte, at the place where these bytes stand."""
    data = path.read_bytes()
    at = data.index(where)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([where[0] ^ 0xFF]))


def cut(path: Path, made: Image) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def without_end(path: Path, made: Image) -> None:
    path.write_bytes(path.read_bytes().rstrip(b"\0"))


def bad_manifest(path: Path, made: Image) -> None:
    flip(path, made.top.data)


def bad_header(path: Path, made: Image) -> None:
    flip(path, f"blobs/sha256/{made.layers[0].encoded}".encode())


def no_tar(path: Path, made: Image) -> None:
    path.write_bytes(b"not a tar at all" * 1000)


def empty(path: Path, made: Image) -> None:
    path.write_bytes(b"")


def no_layout(path: Path, made: Image) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("hello"), io.BytesIO())


def gone(path: Path, made: Image) -> None:
    path.unlink()


def compressed(path: Path, made: Image) -> None:
    subprocess.run(["gzip", "-k", path], check=True)
    path.with_name(path.name + ".gz").replace(path)


def lacks_a_blob(path: Path, made: Image) -> None:
    rewrite(path, lambda name, data: None if made.layers[0].encoded in name else data)


def lock_of_garbage(path: Path, made: Image) -> None:
    rewrite(path, lambda name, data: b"{}" if name == "ociproxy-lock.json" else data)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m)) for m in tar]
        contents = [(name, file.read()) for name, file in members if file is not None]
    with tarfile.open(path, "w") as tar:
        for name, data in contents:
            changed = change(name, data)
            if changed is not None:
                member = tarfile.TarInfo(name)
                member.size = len(changed)
                tar.addfile(member, io.BytesIO(changed))


@pytest.mark.parametrize(
    ("break_it", "code", "reason"),
    [
        (cut, 5, "cut off"),
        (without_end, 5, "cut off"),
        (bad_manifest, 5, "expected digest"),
        (bad_header, 5, "not a tar from byte"),
        (no_tar, 5, "neither a tar"),
        (empty, 5, ""),
        (no_layout, 5, "index.json"),
        (gone, 2, "no such file"),
        (compressed, 5, "compressed"),
        (lacks_a_blob, 5, "is not there"),
        (lock_of_garbage, 2, "ociproxy-lock.json"),
    ],
)
def test_a_damaged_bundle_is_named_in_one_line_at_the_start(
    tmp_path: Path, break_it: Callable[[Path, Image], None], code: int, reason: str
) -> None:
    made = image(layer_size=10_000)
    bundle = export(tmp_path, {"quay.io/a/b:1": made})
    break_it(bundle, made)
    done = refused_start(tmp_path, bundle)
    assert done.returncode == code, done.stderr
    [line] = done.stderr.decode().splitlines()
    assert reason in line
    assert str(bundle) in line


def test_a_foreign_layout_is_a_bundle_too(tmp_path: Path) -> None:
    made = image()
    entry = {
        **made.top.descriptor(),
        "annotations": {"io.containerd.image.name": "quay.io/a/b:1"},
    }
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        **{f"blobs/sha256/{each.encoded}": each.data for each in made.all_content()},
    }
    with tarfile.open(tmp_path / "f.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in reversed(files.items()):
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mtime = len(data), 1.5
            tar.addfile(member, io.BytesIO(data))
    with Bundle(tmp_path / "f.tar") as bundle:
        check_layers(Store(tmp_path / "store", below=[bundle]), made)


def check_layers(store: Store, made: Image) -> None:
    record = store.refs.find_tag(Repository(QUAY, "a/b"), "1")
    assert record is not None
    found = store.manifests.find(record.descriptor.digest)
    assert found is not None
    assert found.raw == made.top.data
    digest = Digest.parse(made.layers[0].digest)
    assert store.blobs.find_size(digest) == made.layers[0].size
    blob = store.blobs.find(digest)
    assert blob is not None
    assert not blob.sealed
    store.blobs.verify(digest, blob.content)
    blob.file.close()
    again = store.blobs.find(digest)
    assert again is not None
    assert again.sealed
    again.file.seek(again.offset)
    assert again.file.read(again.size) == made.layers[0].data
    again.file.close()


def test_a_link_is_no_blob(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        member = tarfile.TarInfo(f"blobs/sha256/{'0' * 64}")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/shadow"
        tar.addfile(member)
    with pytest.raises(LayoutInvalid, match="is a link"):
        Bundle(tmp_path / "l.tar")


def test_what_is_damaged_in_a_bundle_is_taken_from_elsewhere(tmp_path: Path) -> None:
    """As from a skopeo upstream, whose blobs come as files."""
    made = image(layer_size=MIB)
    path = export(tmp_path, {"quay.io/a/b:1": made})
    layer = made.layers[0]
    flip(path, layer.data[:1000])
    digest = Digest.parse(layer.digest)
    with Bundle(path) as bundle:
        store = Store(tmp_path / "over", below=[bundle])
        with Extractor(store) as extractor:
            extractor.take(digest, layer.size, io.BytesIO(layer.data))
            extractor.drain()
    assert store.blobs.path(digest).read_bytes() == layer.data
