"""What other tools make of our archives; the table in docs/interop.md says nothing else."""

from __future__ import annotations

import hashlib
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests.images import Image, image, multi_platform, runnable
from tests.parts.containerd import Containerd
from tests.parts.readers import READERS, Images, verdict
from tests.parts.registry import Registry
from tests.parts.tools import require_root, require_tool, run
from tests.server import PROGRAM, ROOT, Mirror
from tests.stores import put

DOCUMENT = Path(__file__).parents[2] / "docs" / "interop.md"
TEAM = "registry.example/team"

ARCHIVES: dict[str, tuple[Images, tuple[str, ...]]] = {
    "one image": ({f"{TEAM}/one:1": image("one")}, ()),
    "one index": ({f"{TEAM}/index:1": multi_platform("index")}, ()),
    "several images": (
        {
            f"{TEAM}/one:1": image("one"),
            f"{TEAM}/docker:1": image("docker", docker=True),
            f"{TEAM}/index:1": multi_platform("index"),
        },
        (),
    ),
}
ARCHIVES["several, `--format oci`"] = (ARCHIVES["several images"][0], ("--format", "oci"))
ARCHIVES["one image, `--zstd`"] = (ARCHIVES["one image"][0], ("--zstd",))


def ociproxy(*words: str | Path) -> bytes:
    return run(PROGRAM, *words).stdout


def with_ourselves(archive: Path, images: Images, folder: Path) -> list[str]:
    ociproxy("import", archive, "--image-path", folder / "store")
    store = Store(folder / "store")
    found = []
    for name, made in images.items():
        reference = Reference.parse(name)
        record = store.refs.find_tag(reference.repository, reference.tag or "")
        found.append("refused" if record is None else verdict(str(record.descriptor.digest), made))
    return found


ALL_READERS = {**READERS, "`ociproxy import`": with_ourselves}


def documented() -> dict[tuple[str, str], str]:
    """The cells of the table, by reader and archive."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| Reader |"))
    kinds = cells(lines[start])[1:]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        reader, *values = cells(line)
        found.update({(reader, kind): value for kind, value in zip(kinds, values, strict=True)})
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def archive_of(kind: str, tmp_path: Path) -> tuple[Path, Images]:
    images, options = ARCHIVES[kind]
    store = Store(tmp_path / "store")
    for name, made in images.items():
        put(store, name, made)
    # skopeo takes a colon in the path for the end of it.
    path = tmp_path / ("archive.tar.zst" if "--zstd" in options else "archive.tar")
    ociproxy("export", path, "--image-path", store.root, "--platform", "linux/amd64", *options)
    return path, images


def test_the_table_has_every_reader_and_every_archive() -> None:
    assert set(documented()) == {(reader, kind) for reader in ALL_READERS for kind in ARCHIVES}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("reader", ALL_READERS)
def test_a_reader_does_what_the_table_says(reader: str, kind: str, tmp_path: Path) -> None:
    require_root()
    path, images = archive_of(kind, tmp_path)
    folder = tmp_path / "reader"
    folder.mkdir()
    found = set(ALL_READERS[reader](path, images, folder))
    said = found.pop() if len(found) == 1 else "some refused" if "refused" in found else "mixed"
    assert said == documented()[reader, kind]


def test_digest_names_let_containerd_find_images_by_digest(
    tmp_path: Path, containerd: Containerd
) -> None:
    made = image("one")
    store = Store(tmp_path / "store")
    put(store, f"{TEAM}/one:1", made)
    options: list[str | Path] = ["--image-path", store.root, "--digest-names"]
    ociproxy("export", tmp_path / "a.tar", *options)
    containerd.ctr("images", "import", str(tmp_path / "a.tar"))
    found = containerd.images()
    assert found[f"{TEAM}/one:1"] == found[f"{TEAM}/one@{made.digest}"] == made.digest
    assert containerd.holds(made)


def test_export_and_import_and_export_is_the_same_archive(tmp_path: Path) -> None:
    images: dict[str, Image] = {**ARCHIVES["several images"][0], "nginx:1": image("nginx")}
    sums = []
    for turn, names in enumerate([list(images), list(images)[::-1]]):
        store = Store(tmp_path / f"store{turn}")
        for name in names:
            put(store, name, images[name], resolved=1.7e9 + turn)
        sums.append(hashlib.sha256(ociproxy("export", "-", "--image-path", store.root)).digest())
    ociproxy("export", tmp_path / "a.tar", "--image-path", tmp_path / "store0")
    ociproxy("import", tmp_path / "a.tar", "--image-path", tmp_path / "other")
    again = ociproxy("export", "-", "--image-path", tmp_path / "other")
    assert sums == [hashlib.sha256(again).digest()] * 2


def test_skopeo_pushes_an_archive_into_a_registry_as_documented(tmp_path: Path) -> None:
    require_tool("skopeo")
    text = (DOCUMENT.parent / "airgap.md").read_text(encoding="utf-8")
    section = text.partition("## Push into another registry")[2]
    script = section.partition("```sh\n")[2].partition("```")[0]
    store = Store(tmp_path / "store")
    made = {"team/one:1": image("one"), "team/multi:2": multi_platform("multi")}
    for name, each in made.items():
        put(store, f"registry.example/{name}", each)
    with Registry(tmp_path / "registry") as registry:
        script = script.replace("registry.internal", registry.name)
        script = script.replace(
            "skopeo copy", "skopeo --insecure-policy copy --dest-tls-verify=false"
        )
        script = script.replace("ociproxy ", f"{sys.executable} -m ociproxy ")
        env = {"OCIPROXY_IMAGE_PATH": str(store.root), "PYTHONPATH": str(ROOT)}
        run("sh", "-ec", f"cd {tmp_path}\n{script}", env=env)
        for name, each in made.items():
            child = each.manifests[0] if each.manifests else each.top
            repository, _, tag = name.partition(":")
            url = f"{registry.url}/v2/{repository}/manifests/{tag}"
            request = urllib.request.Request(url, headers={"Accept": child.media_type})
            with urllib.request.urlopen(request) as answer:
                assert answer.read() == child.data


def test_volumes_and_a_delta_are_imported(tmp_path: Path) -> None:
    base, newer = image("base", layers=4, layer_size=300_000), image("newer")
    store = Store(tmp_path / "store")
    put(store, f"{TEAM}/base:1", base)
    source: list[str | Path] = ["--image-path", store.root]
    ociproxy("export", tmp_path / "v.tar", *source, "--volume-size", "500K")
    ociproxy("export", tmp_path / "base.tar", *source)
    put(store, f"{TEAM}/newer:1", newer)
    ociproxy("export", tmp_path / "d.tar", *source, "--since", tmp_path / "base.tar")
    target: list[str | Path] = ["--image-path", tmp_path / "other"]
    ociproxy("import", *sorted(tmp_path.glob("v.*of*.tar")), *target)
    ociproxy("import", tmp_path / "d.tar", *target)
    assert ociproxy("diff", store.root, tmp_path / "other") == b"no difference\n"


def test_containerd_pulls_from_a_bundle_and_runs_it_offline(
    tmp_path: Path, containerd: Containerd, mirror: Callable[..., Mirror]
) -> None:
    program, index = runnable(), multi_platform("index", layers=2)
    store = Store(tmp_path / "store")
    put(store, f"{TEAM}/program:1", program)
    put(store, f"{TEAM}/index:1", index)
    ociproxy("export", tmp_path / "a.tar", "--image-path", store.root)
    server = mirror(args=["--offline", "--bundle", str(tmp_path / "a.tar")])
    containerd.use_mirror(server.url)
    assert containerd.pull(f"{TEAM}/program:1") == program.digest
    assert containerd.pull(f"{TEAM}/program@{program.digest}") == program.digest
    assert containerd.pull(f"{TEAM}/index:1", all_platforms=True) == index.digest
    assert containerd.holds(index)
    assert containerd.run(f"{TEAM}/program:1") == b"hello from ociproxy\n"
    assert list((server.store / "blobs").iterdir()) == []
