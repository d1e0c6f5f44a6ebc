"""What skopeo cannot bring, since it copies images: each is refused by name, with what to do. And
what a layout has to hold before its manifest is published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from ociproxy.config.settings import Fetch
from ociproxy.errors import (
    BlobUnknown,
    DigestMismatch,
    SizeMismatch,
    UpstreamUnavailable,
)
from ociproxy.fetch.skopeo.backend import SkopeoBackend
from ociproxy.fetch.skopeo.image_layout import Image as CopiedImage
from ociproxy.fetch.skopeo.image_layout import ImageLayout
from ociproxy.oci.descriptor import OCI_ARTIFACT
from ociproxy.oci.layout import blob_path
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import entry
from tests.fetch.contract import digest, fetch_blob, reference, repository
from tests.images import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Content,
    Image,
    content,
    image,
    image_of,
    layer,
    random_blob,
)
from tests.load.loading import Load
from tests.parts.tools import require_tool
from tests.stores import put
from tests.upstream import FakeUpstream

ELSEWHERE = {"urls": ["https://elsewhere.example/layer"]}
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


@pytest.fixture(autouse=True)
def _skopeo() -> None:
    require_tool("skopeo")


def document(media_type: str, **fields: object) -> Content:
    made = {"schemaVersion": 2, "mediaType": media_type, **fields}
    return content(json.dumps(made).encode(), media_type)


BLOB = random_blob(1000)
ODD = {
    f"no blobs of {OCI_INDEX}": document(OCI_INDEX, manifests=[BLOB.descriptor()]),
    f"no blobs of {OCI_ARTIFACT}": document(
        OCI_ARTIFACT, artifactType="application/x.thing", blobs=[BLOB.descriptor()]
    ),
    "no layers that have URLs": document(
        OCI_MANIFEST,
        config=content(b"{}", OCI_CONFIG).descriptor(),
        layers=[BLOB.descriptor(**ELSEWHERE)],
    ),
    "no blob that no manifest pulled from": document(OCI_INDEX, manifests=[]),
}
"""By what is said of the blob."""


@pytest.mark.parametrize("said", ODD)
def test_a_blob_that_skopeo_does_not_copy_is_refused_with_what_to_do(
    upstream: FakeUpstream, tmp_path: Path, said: str
) -> None:
    """Also where the store alone knows the document, as after a restart."""
    store, where = Store(tmp_path / "store"), repository(upstream, "team/odd")
    made = upstream.add("team/odd", Image(ODD[said], blobs=(BLOB,)), tag="v1")
    words = f"skopeo brings {re.escape(said)}.*: use the backend oras"
    for _ in range(2):
        with closing(SkopeoBackend(entry(upstream), Fetch(), store)) as backend:
            if store.manifests.find(digest(made.top)) is None:
                holder = backend.fetch_manifest(reference(upstream, "team/odd:v1"))
                store.commit_manifest(where, holder)
            with pytest.raises(BlobUnknown, match=words):
                backend.stat_blob(where, digest(BLOB))
            with pytest.raises(BlobUnknown, match=words):
                fetch_blob(backend, where, digest(BLOB), store)
    assert upstream.count("/blobs/") == 0


def add_with_layer_elsewhere(upstream: FakeUpstream, blob: Content) -> str:
    """The name of an image that has this blob as a layer, with URLs beside."""
    made = image_of([layer({"a": b"a"})])
    manifest = made.top.json()
    manifest["layers"].append(blob.descriptor(**ELSEWHERE))
    top = content(json.dumps(manifest).encode(), OCI_MANIFEST)
    upstream.add("team/app", Image(top, blobs=(*made.blobs, blob)), tag="v1")
    return f"{upstream.registry}/team/app:v1"


def test_a_plan_fails_for_what_a_load_fails_for(upstream: FakeUpstream, load: Load) -> None:
    """Also where the store has the manifests, so that skopeo is not asked for them."""
    odd = [Image(top, blobs=(BLOB,)) for top in list(ODD.values())[:2]]
    names = [f"{upstream.registry}/team/odd-{number}:v1" for number in range(len(odd))]
    for number, made in enumerate(odd):
        upstream.add(f"team/odd-{number}", made, tag="v1")
    names.append(add_with_layer_elsewhere(upstream, BLOB))
    listed = load.write(*names)

    def failures(*words: str) -> dict[str, str]:
        done = load.run(listed, "--backend", "skopeo", "--json", *words)
        assert done.code == 3
        return {each["reference"]: each["reason"] for each in done.events("failed")}

    planned = failures("--plan")
    assert planned == failures()
    assert set(planned) == set(names)
    for name, made in zip(names, odd, strict=False):
        put(Store(load.store), name, Image(made.top))
    assert failures("--plan") == planned


def test_an_image_that_skopeo_cannot_bring_whole_is_not_stored_in_part(
    upstream: FakeUpstream, load: Load
) -> None:
    name = add_with_layer_elsewhere(upstream, BLOB)
    done = load.run(load.write(name), "--backend", "skopeo")
    assert done.code == 3
    assert f"{BLOB.digest}: skopeo brings no layers that have URLs: use the backend" in done.stderr
    assert load.tag(name) is None
    assert load.run(load.write(name), "--backend", "oras").code == 0
    assert load.complete() == {name}


def test_a_layer_that_need_not_be_distributed_and_skopeo_does_not_bring_is_named(
    upstream: FakeUpstream, load: Load
) -> None:
    """The registry has it. skopeo would never ask."""
    kept = content(b"not to be distributed", NONDISTRIBUTABLE)
    name = add_with_layer_elsewhere(upstream, kept)
    plan = load.run(load.write(name), "--backend", "skopeo", "--plan")
    done = load.run(load.write(name), "--backend", "skopeo")
    assert plan.code == done.code == 3
    assert f"{name} would be incomplete: no non-distributable layer {kept.digest}" in plan.stderr
    assert (
        f"incomplete: no non-distributable layer {kept.digest}: skopeo brings no layers that have "
        "URLs: use the backend oras; it may be at https://elsewhere.example/layer" in done.stderr
    )
    assert load.complete() == set()


def remove_blob(path: Path) -> None:
    path.unlink()


def change(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(bytes((raw[0] ^ 1,)) + raw[1:])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def take_in(layout: ImageLayout, store: Store) -> None:
    layout.collect(store.room, Event())
    layout.publish("registry.example")


@pytest.mark.parametrize(
    ("part", "damage", "error"),
    [
        ("manifest", remove_blob, UpstreamUnavailable),
        ("manifest", change, DigestMismatch),
        ("manifest", lengthen, SizeMismatch),
        ("layer", remove_blob, UpstreamUnavailable),
        ("layer", change, DigestMismatch),
        ("layer", lengthen, SizeMismatch),
    ],
)
def test_a_layout_with_one_wrong_file_publishes_no_manifest(
    tmp_path: Path, part: str, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    store, where = Store(tmp_path / "store"), Repository.parse("registry.example", "app")
    made = image(layers=2)
    holder = ManifestHolder.of(made.top.data)
    copied = CopiedImage(where, holder.descriptor, holder.manifest.blobs)
    layout = ImageLayout(copied, tmp_path / "layout", store)
    layout.prepare()
    for each in (made.top, *made.blobs):
        (layout.path / blob_path(digest(each))).write_bytes(each.data)
    wrong = made.top if part == "manifest" else made.layers[0]
    damage(layout.path / blob_path(digest(wrong)))
    with pytest.raises(error):
        take_in(layout, store)
    assert store.blobs.find_size(digest(wrong)) is None
    assert store.manifests.find(digest(made.top)) is None
    assert store.refs.manifests(where) == []
    (layout.path / blob_path(digest(wrong))).write_bytes(wrong.data)
    take_in(layout, store)
    assert store.refs.manifests(where) == [digest(made.top)]
