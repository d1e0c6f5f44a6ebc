"""`ociproxy ready`: what it says comes up, comes up; and `list` and `load --plan` say the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from ociproxy.cli.main import main
from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.store.store import Store
from tests.images import (
    OCI_INDEX,
    Content,
    Image,
    artifact,
    attested_index,
    content,
    image,
    index,
    multi_platform,
)
from tests.server import Mirror, upstream_entry
from tests.stores import put, record_tag, stored
from tests.upstream import FakeUpstream

PLATFORM, OTHER = "linux/amd64", "linux/arm64"


class Case:
    """A store, a configuration and lists in a folder."""

    def __init__(self, folder: Path, registry: str = "registry.example") -> None:
        self.folder, self.registry = folder, registry
        self.store = Store(folder / "store")
        self.config = folder / "config.yaml"
        self.configure()

    def configure(self, **config: object) -> None:
        entry = upstream_entry(f"http://{self.registry}", **config)
        self.config.write_text(yaml.safe_dump({"upstreams": [entry]}))

    def name(self, repository: str, tag: str = "v1") -> str:
        return f"{self.registry}/team/{repository}:{tag}"

    def put(self, repository: str, made: Image) -> Image:
        put(self.store, self.name(repository), made)
        return made

    def lose(self, *contents: Content) -> None:
        for each in contents:
            stored(self.store, each).unlink()

    def write(self, *lines: str) -> str:
        path = self.folder / "images.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    def run(self, command: str, *words: str) -> Result:
        where = ["--image-path", str(self.store.root), "--config-path", str(self.config)]
        done = CliRunner().invoke(main, [command, *where, *words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    def ready(self, *lines: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
        """What `--json` says of each image, by reference; the exit code agrees."""
        done = self.run("ready", self.write(*lines), "--json", *options)
        *images, last = [json.loads(line) for line in done.stdout.splitlines()]
        wrong = sum(not each["ready"] for each in images)
        assert last == {"event": "done", "ready": len(images) - wrong, "notReady": wrong}
        assert done.exit_code == (3 if wrong else 0)
        return {each["reference"]: each for each in images}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@dataclass(frozen=True, slots=True)
class Odd:
    """A line of a list, and whether its image comes up for its platform; `listed` is what `list`
    says, which knows no platform that is asked for."""

    line: str
    ready: bool
    listed: bool | None


def odd_store(case: Case, upstream: FakeUpstream) -> dict[str, Odd]:
    """Images in every state that a store can be in; the upstream has all of them whole."""
    found: dict[str, Odd] = {}

    def add(name: str, made: Image, *, ready: bool, listed: bool | None, asked: str) -> None:
        upstream.add(f"team/{name}", made, tag="v1")
        case.put(name, made)
        found[name] = Odd(f"{case.name(name)} platform={asked}", ready, listed)

    def many(name: str) -> tuple[Image, dict[str, Image]]:
        images = {each: image(name, platform=each) for each in (PLATFORM, OTHER)}
        return index(images), images

    add("whole", multi_platform("whole"), ready=True, listed=True, asked=OTHER)
    add("plain", image("plain"), ready=True, listed=True, asked=PLATFORM)
    made, images = many("layer")
    add("layer", made, ready=False, listed=False, asked=OTHER)
    case.lose(*images[OTHER].layers)
    made, images = many("beside")
    add("beside", made, ready=True, listed=False, asked=PLATFORM)
    case.lose(*images[OTHER].layers)
    made, images = many("child")
    add("child", made, ready=False, listed=True, asked=OTHER)
    case.lose(images[OTHER].top, *images[OTHER].blobs)
    made, images = many("sparse")
    add("sparse", made, ready=True, listed=True, asked=PLATFORM)
    case.lose(images[OTHER].top, *images[OTHER].blobs)
    add("config", (made := image("config")), ready=False, listed=False, asked=PLATFORM)
    case.lose(made.blobs[0])
    add("cut", (made := image("cut")), ready=False, listed=False, asked=PLATFORM)
    path = stored(case.store, made.layers[0])
    path.write_bytes(made.layers[0].data[:-1])
    add("absent", many("absent")[0], ready=False, listed=True, asked="linux/s390x")
    add("foreign", image("foreign"), ready=False, listed=True, asked=OTHER)
    made, about = attested_index({PLATFORM: image("attested")})
    add("attested", made, ready=True, listed=True, asked=PLATFORM)
    case.lose(about[PLATFORM].top)
    add("moved", image("moved"), ready=False, listed=False, asked=PLATFORM)
    new = upstream.add("team/moved", image("moved on"), tag="v1")
    top = Descriptor(new.top.media_type, Digest.parse(new.digest), new.top.size)
    repository = Reference.parse(case.name("moved")).repository
    record_tag(case.store, repository, "v1", top, now=1.8e9)
    upstream.add("team/never", image("never"), tag="v1")
    found["never"] = Odd(f"{case.name('never')} platform={PLATFORM}", ready=False, listed=None)
    return found


def comes_up(server: Mirror, line: str) -> bool:
    """Pull as a client of the platform does, from a server that is offline."""
    reference, _, asked = line.partition(" platform=")
    name, tag = reference.removeprefix(f"{server_registry(reference)}/").rsplit(":", 1)

    def get(kind: str, what: str) -> Any:
        answer = server.get(f"/v2/{name}/{kind}/{what}?ns={server_registry(reference)}")
        return answer if answer.status == 200 else None

    answer = get("manifests", tag)
    if answer is None:
        return False
    document = answer.json()
    if "manifests" in document:
        for child in document["manifests"]:
            place = child["platform"]
            if f"{place['os']}/{place['architecture']}" == asked:
                answer = get("manifests", child["digest"])
                break
        else:
            return False
        if answer is None:
            return False
        document = answer.json()
    blobs = [(each, get("blobs", each["digest"])) for each in blobs_in(document)]
    if not all(answer and len(answer.body) == each["size"] for each, answer in blobs):
        return False
    config = blobs[0][1].json()
    return f"{config['os']}/{config['architecture']}" == asked


def server_registry(reference: str) -> str:
    return reference.partition("/")[0]


def blobs_in(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [document["config"], *document["layers"]]


def test_ready_list_plan_and_an_offline_server_agree(
    tmp_path: Path, upstream: FakeUpstream, mirror: Callable[..., Mirror]
) -> None:
    case = Case(tmp_path, upstream.registry)
    odd = odd_store(case, upstream)
    lines = [each.line for each in odd.values()]
    ready = {name.split("/")[2][:-3]: each for name, each in case.ready(*lines).items()}
    assert {name: each["ready"] for name, each in ready.items()} == {
        name: each.ready for name, each in odd.items()
    }

    # `list`: of the platforms that it names, the wanted one is complete.
    listed = {
        each["reference"]: each
        for each in json.loads(case.run("list", "--format", "json").stdout)
        if "@" not in each["reference"]
    }
    for name, each in odd.items():
        entry = listed.get(case.name(name))
        assert (entry and entry["complete"]) == each.listed, name
        asked = each.line.partition("platform=")[2]
        named = entry["platforms"] if entry else []
        whole = [each for each in named if each["platform"] == asked and each["complete"]]
        assert bool(whole) == each.ready, name

    # `load --plan`: it would fetch nothing.
    done = case.run("load", case.write(*lines), "--plan", "--json")
    (plan,) = [e for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "plan"]
    nothing = {each["reference"] for each in plan["images"] if each["new"] == 0}
    assert nothing == {case.name(name) for name, each in odd.items() if each.ready}

    # A client of a server that is offline.
    server = mirror([upstream_entry(upstream.url)], args=["--offline"], store=case.store.root)
    assert {name: comes_up(server, each.line) for name, each in odd.items()} == {
        name: each.ready for name, each in odd.items()
    }


def test_each_image_says_why(tmp_path: Path, upstream: FakeUpstream) -> None:
    case = Case(tmp_path, upstream.registry)
    odd = odd_store(case, upstream)
    done = case.run("ready", case.write(*(each.line for each in odd.values())))
    rows = {row.split()[0]: row for row in done.stdout.splitlines()}
    assert "\x1b" not in done.stdout
    for name, why in {
        "layer": "layer not stored (sha256:",
        "child": "linux/arm64 not stored (sha256:",
        "config": "config not stored (sha256:",
        "cut": "bytes stored of ",
        "absent": "lacks linux/s390x; it has linux/amd64, linux/arm64",
        "foreign": "lacks linux/arm64; it has linux/amd64",
        "moved": "the tag is known, but not its manifest sha256:",
        "never": "the tag is not stored",
    }.items():
        assert " no " in rows[case.name(name)], name
        assert why in rows[case.name(name)], name
    assert " not linux/arm64 " in rows[case.name("layer")]
    wrong = sum(not each.ready for each in odd.values())
    assert done.stderr == f"{len(odd)} images, {wrong} of them not ready\n"


def test_content_of_another_repository_comes_up_unless_repositories_are_isolated(
    case: Case,
) -> None:
    made = case.put("mine", multi_platform("shared"))
    theirs = f"{case.registry}/team/theirs"
    by_digest = f"{theirs}@{made.digest}"
    assert case.ready(by_digest)[by_digest]["ready"]
    # By tag the server would have to ask.
    by_tag = f"{theirs}:v1"
    assert case.ready(by_tag)[by_tag]["refusal"] == "the tag is not stored"

    case.configure(isolation="repository")
    assert case.ready(case.name("mine"))[case.name("mine")]["ready"]
    refused = case.ready(by_digest)[by_digest]
    assert "under another repository only" in refused["refusal"]
    # An index of this repository, and a child that came for the other one.
    repository = Reference.parse(by_digest).repository
    holder = case.store.manifests.find(Digest.parse(made.digest))
    assert holder is not None
    case.store.commit_manifest(repository, holder)
    ((platform,),) = [
        each["platforms"] for each in case.ready(f"{by_digest} platform={OTHER}").values()
    ]
    assert platform["missing"] == [
        {
            "digest": made.manifests[1].digest,
            "reason": "stored under another repository only",
        }
    ]


def test_what_the_configuration_refuses_does_not_come_up(case: Case) -> None:
    case.put("secret", image("secret"))
    case.configure(repositories={"deny": ["team/secret"]})
    found = case.ready(case.name("secret"))[case.name("secret")]
    assert "repositories.deny" in found["refusal"]
    case.configure(isolation="repository")
    put(case.store, "elsewhere.example/a/b:v1", image("unlisted"))
    (found,) = case.ready("elsewhere.example/a/b:v1").values()
    assert "not listed" in found["refusal"]


def test_a_pair_of_tag_and_digest_needs_the_digest_only(case: Case) -> None:
    old = case.put("app", image("old"))
    case.put("app", image("new"))
    pair = f"{case.name('app')}@{old.digest}"
    assert case.ready(pair)[pair]["ready"]


def test_all_platforms_are_all_that_the_index_lists(case: Case) -> None:
    images = {each: image("app", platform=each) for each in (PLATFORM, OTHER)}
    case.put("app", index(images))
    name = case.name("app")
    assert case.ready(name, options=("--all-platforms",))[name]["ready"]
    case.lose(images[OTHER].top)
    found = case.ready(name, options=("--all-platforms",))[name]
    assert [(p["platform"], p["ready"]) for p in found["platforms"]] == [
        (PLATFORM, True),
        (OTHER, False),
    ]
    assert case.ready(name, options=("--platform", PLATFORM))[name]["ready"]


def test_children_without_a_platform_are_needed_by_every_platform(case: Case) -> None:
    parts = [image("one"), image("two")]
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [each.top.descriptor() for each in parts],
    }
    top = content(json.dumps(document).encode(), OCI_INDEX)
    blobs = tuple(blob for each in parts for blob in each.blobs)
    case.put("app", Image(top, tuple(each.top for each in parts), blobs))
    name = case.name("app")
    for option in ("--all-platforms", f"--platform={PLATFORM}"):
        assert case.ready(name, options=(option,))[name]["ready"]
    case.lose(parts[1].top)
    for option in ("--all-platforms", f"--platform={PLATFORM}"):
        assert not case.ready(name, options=(option,))[name]["ready"]


def test_signatures_and_attestations_must_be_there_if_asked_for(case: Case) -> None:
    signed = ("--referrers", "--platform", PLATFORM)

    def ready(name: str) -> Any:
        return case.ready(case.name(name), options=signed)[case.name(name)]

    case.put("bare", image("bare"))
    assert "no signature, SBOM or attestation" in ready("bare")["refusal"]
    # By the referrers API.
    app = case.put("app", image("app"))
    signature = artifact(app.top)
    put(case.store, f"{case.registry}/team/app@{signature.digest}", signature)
    assert (ready("app")["ready"], ready("app")["referrers"]) == (True, 1)
    case.lose(signature.blobs[-1])
    assert not ready("app")["ready"]
    case.lose(signature.top)
    (missing,) = ready("app")["platforms"][0]["missing"]
    assert missing == {"digest": signature.digest, "reason": "referrer not stored"}
    # By cosign's tag.
    old = case.put("old", image("old"))
    cosign = image("signature of old")
    put(case.store, case.name("old", f"sha256-{old.top.encoded}.sig"), cosign)
    assert ready("old")["ready"]
    case.lose(cosign.layers[0])
    assert not ready("old")["ready"]
    # In the index.
    made, about = attested_index(
        {each: image("index", platform=each) for each in (PLATFORM, OTHER)}
    )
    case.put("index", made)
    assert (ready("index")["ready"], ready("index")["referrers"]) == (True, 1)
    case.lose(about[OTHER].top)
    assert ready("index")["ready"]
    case.lose(about[PLATFORM].top)
    (missing,) = ready("index")["platforms"][0]["missing"]
    assert missing == {"digest": about[PLATFORM].digest, "reason": "attestation not stored"}


def test_what_is_reported_is_on_the_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    app = case.put("app", image("app"))
    flushed: set[str] = set()
    fsync = os.fsync

    def record(file: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    assert case.ready(case.name("app"))[case.name("app")]["ready"]
    assert flushed >= {each.encoded for each in app.all_content()} | {"v1", "blobs", "img"}


def test_kubernetes_manifests_are_read_as_by_load(case: Case) -> None:
    case.put("app", image("app"))
    pod = case.folder / "pod.yaml"
    spec = {"containers": [{"name": "a", "image": case.name("app")}]}
    pod.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "spec": spec}))
    done = case.run("ready", "--kubernetes", str(pod))
    assert (done.exit_code, done.stderr) == (0, "1 image, all ready\n")


@pytest.mark.parametrize(
    ("lines", "said"),
    [(["a b c"], "images.txt:1: "), (None, "give an IMAGELIST")],
)
def test_bad_input_is_said(case: Case, lines: list[str] | None, said: str) -> None:
    done = case.run("ready", *([case.write(*lines)] if lines else []))
    assert (done.exit_code, said in done.stderr) == (2, True)


def test_a_folder_without_a_store_is_not_made_one(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["ready", "--image-path", str(tmp_path / "none"), "-"])
    assert (done.exit_code, list(tmp_path.iterdir())) == (4, [])


def test_asking_is_no_use_and_asks_no_upstream(tmp_path: Path, upstream: FakeUpstream) -> None:
    case = Case(tmp_path, upstream.registry)
    app = case.put("app", image("app"))
    files = [stored(case.store, each) for each in app.all_content()]
    for each in files:
        os.utime(each, ns=(1, each.stat().st_mtime_ns))
    case.ready(case.name("app"))
    assert {each.stat().st_atime_ns for each in files} == {1}
    assert upstream.requests == []
