"""`--lock` pins tags to digests; `--locked` asks for none."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from ociproxy.archive.lock import read_lock
from tests.images import (
    Image,
    artifact,
    content,
    image,
    image_of,
    layer,
    multi_platform,
)
from tests.load.loading import Load
from tests.parts.tools import run
from tests.server import ROOT
from tests.upstream import FakeUpstream


def test_lock_pins_what_a_later_load_gets(upstream: FakeUpstream, load: Load) -> None:
    old = upstream.add("team/app", multi_platform("old"), tag="v1")
    one = upstream.add("team/one", image("one"), tag="v1")
    names = [f"{upstream.registry}/team/{name}:v1" for name in ("app", "one")]
    lock = load.folder / "images.lock"
    assert load.run(load.write(*names), "--arch", "amd64", "--lock", str(lock)).code == 0
    document = json.loads(lock.read_bytes())
    assert [(each["reference"], each["digest"]) for each in document["images"]] == [
        (names[0], old.digest),
        (names[1], one.digest),
    ]
    assert [each["platforms"] for each in document["images"]] == [["linux/amd64"], ["linux/amd64"]]
    contents = {each["digest"] for each in document["contents"]}
    assert contents == {
        *(content.digest for content in one.all_content()),
        old.digest,
        old.manifests[0].digest,
        *(layer["digest"] for layer in old.manifests[0].json()["layers"]),
        old.manifests[0].json()["config"]["digest"],
    }
    upstream.add("team/app", multi_platform("new"), tag="v1")
    for args in ([load.write(*names), "--arch", "amd64"], []):
        shutil.rmtree(load.store)
        upstream.requests.clear()
        done = load.run(*args, "--lock", str(lock), "--locked")
        assert (done.code, load.tag(names[0])) == (0, old.digest)
        assert load.complete() == set(names)
        assert all("/manifests/v1" not in request.path for request in upstream.requests)
    assert json.loads(lock.read_bytes()) == document


@pytest.mark.parametrize(
    "options",
    [["--platform", "linux/amd64"], ["--all-platforms"], ["--platform", "linux/arm/v8"]],
    ids=["one platform", "all platforms", "a variant that falls back"],
)
@pytest.mark.parametrize("more", [[], ["--referrers"]], ids=["plain", "with referrers"])
def test_locks_of_the_same_images_are_the_same_bytes(
    upstream: FakeUpstream, load: Load, options: list[str], more: list[str]
) -> None:
    app = upstream.add("team/app", attested(multi_platform("app")), tag="v1")
    one = upstream.add("team/one", image("one"), tag="v1")
    if more:
        for subject in (app.top, one.top):
            upstream.add("team/app", artifact(subject))
            signature = image_of([layer({"sig": b"x"})], platform="")
            tag = subject.digest.replace(":", "-") + ".sig"
            upstream.add("team/app" if subject is app.top else "team/one", signature, tag=tag)
    listed = load.write(*(f"{upstream.registry}/team/{name}:v1" for name in ("app", "one")))
    locks = []
    for when, how in (("empty", ["--plan"]), ("load", []), ("full", ["--plan"])):
        path = load.folder / when
        done = load.run(listed, *options, *more, *how, "--lock", str(path))
        assert done.code == 0, done.stderr
        locks.append(path.read_bytes())
    archive = load.folder / "archive.tar"
    words = ["export", str(archive), "--image-path", str(load.store)]
    run(sys.executable, "-m", "ociproxy", *words, cwd=ROOT)
    locks.append(read_lock(archive).encode())
    assert locks[0].decode() == locks[1].decode()
    assert len(set(locks)) == 1, "\n".join(map(bytes.decode, set(locks)))


def attested(made: Image) -> Image:
    """The index with an attestation by BuildKit of its first image."""
    subject = made.manifests[0]
    attestation = image("attestation")
    document = made.top.json()
    document["manifests"].append(
        {
            **attestation.top.descriptor(),
            "annotations": {
                "vnd.docker.reference.digest": subject.digest,
                "vnd.docker.reference.type": "attestation-manifest",
            },
            "platform": {"os": "unknown", "architecture": "unknown"},
        }
    )
    top = content(json.dumps(document).encode(), made.top.media_type)
    return Image(top, (*made.manifests, attestation.top), blobs=(*made.blobs, *attestation.blobs))


def test_what_the_lock_lacks_is_refused_before_anything_is_asked(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    lock = load.folder / "lock"
    name = f"{upstream.registry}/team/app:v1"
    assert load.run(load.write(name), "--lock", str(lock)).code == 0
    upstream.requests.clear()
    done = load.run(load.write(name, "nginx"), "--lock", str(lock), "--locked")
    assert done.code == 2
    assert "images.txt:2: docker.io/library/nginx:latest is not in the lock" in done.stderr
    assert upstream.requests == []


def test_lock_is_not_written_with_images_missing(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    registry = upstream.registry
    lock = load.folder / "lock"
    lock.write_text("what was there")
    listed = load.write(f"{registry}/team/app:v1", f"{registry}/team/gone:v1")
    done = load.run(listed, "--lock", str(lock))
    assert done.code == 3
    assert "is not written" in done.stderr
    assert lock.read_text() == "what was there"


def test_locked_needs_a_lock(load: Load) -> None:
    assert "give --lock FILE" in load.run("--locked").stderr
    missing = load.run("--locked", "--lock", str(load.folder / "none"))
    assert (missing.code, "cannot be read" in missing.stderr) == (2, True)
    (load.folder / "bad").write_text("{}")
    bad = load.run("--locked", "--lock", str(load.folder / "bad"))
    assert (bad.code, "ociproxy-lock/1" in bad.stderr) == (2, True)
