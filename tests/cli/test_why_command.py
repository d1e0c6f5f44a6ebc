"""`ociproxy why`: what it foretells of a request, a server then does; and the rest of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
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
    OCI_MANIFEST,
    Image,
    artifact,
    attested_index,
    image,
    index,
    multi_platform,
)
from tests.server import Mirror, upstream_entry
from tests.stores import damage, put, record_tag, stored
from tests.upstream import FakeUpstream

LONG_AGO = 1_000_000.0
AMD64, ARM64 = "linux/amd64", "linux/arm64"


class Situation:
    """A store with images in many states, of which the upstream has most."""

    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self.store = Store(folder / "store")
        self.upstream = upstream
        self.config = folder / "why.yaml"
        self.configure({})
        self.names: dict[str, str] = {}

    def configure(self, config: dict[str, object]) -> None:
        self.config.write_text(yaml.safe_dump(config))

    def add(self, name: str, made: Image, *, fresh: bool = True, held: bool = True) -> Image:
        """An image at the upstream and, if `held`, in the store."""
        self.upstream.add(f"team/{name}", made, tag="v1")
        if held:
            resolved = time.time() if fresh else LONG_AGO
            put(self.store, self.name(name), made, resolved=resolved)
        self.names[name] = self.name(name)
        return made

    def name(self, repository: str) -> str:
        return f"{self.upstream.registry}/team/{repository}:v1"

    def repository(self, name: str) -> str:
        return self.name(name).removesuffix(":v1")

    def record(self, name: str, made: Image) -> None:
        repository = Reference.parse(self.name(name)).repository
        top = Descriptor(OCI_MANIFEST, Digest.parse(made.digest), made.top.size)
        record_tag(self.store, repository, "v1", top, now=time.time())

    def run(self, reference: str, *words: str) -> Result:
        where = ["--image-path", str(self.store.root), "--config-path", str(self.config)]
        done = CliRunner().invoke(main, ["why", *where, reference, *words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    def why(self, reference: str) -> dict[str, Any]:
        done = self.run(reference, "--json")
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def screen(self, reference: str) -> dict[str, str]:
        """Its lines by their names, for a name that stands there once."""
        done = self.run(reference)
        first, *lines = done.stdout.splitlines()
        assert first == str(Reference.parse(reference))
        assert max(map(len, lines)) < 200
        return {line[2:12].strip(): line[12:] for line in reversed(lines)}


@pytest.fixture
def situation(tmp_path: Path, upstream: FakeUpstream) -> Situation:
    return Situation(tmp_path, upstream)


def foretold(steps: list[str]) -> tuple[int, str]:
    """The status of a GET of the manifest, and how the upstream is asked."""
    first = steps[0]
    if first.startswith(("403 DENIED", "404")):
        return int(first[:3]), ""
    if first.startswith("One HEAD asks"):
        return 200, "HEAD"
    if "is fetched from" in first:
        return 200, "GET"
    assert "is answered from the store" in first or "as stale" in first
    return 200, ""


def done(server: Mirror, situation: Situation, reference: str) -> tuple[int, str]:
    """What became of a GET of the manifest."""
    parsed = Reference.parse(reference)
    registry, name = parsed.repository.registry, parsed.repository.name
    before = len(situation.upstream.requests)
    asked = str(parsed.digest or parsed.tag)
    status = server.manifest(registry, name, asked).status
    requests = situation.upstream.requests[before:]
    methods = [each.method for each in requests if each.path.endswith(f"/manifests/{asked}")]
    return status, "".join(methods)


def reloads(server: Mirror, number: int) -> bool:
    return server.log().count("configuration reloaded") == number


def test_a_server_does_what_is_foretold(
    situation: Situation, mirror: Callable[..., Mirror], make_upstream: Callable[..., FakeUpstream]
) -> None:
    many = {each: image("sparse", platform=each) for each in (AMD64, ARM64)}
    add = situation.add
    add("absent", image("absent"), held=False)
    add("fresh", image("fresh"))
    add("expired", image("expired"), fresh=False)
    add("never", image("never"), fresh=False)
    add("always", image("always"))
    situation.record("named", add("named", image("named"), held=False))
    lost = add("layer", image("layer"))
    stored(situation.store, lost.layers[0]).unlink()
    add("sparse", index(many))
    stored(situation.store, many[ARM64].top).unlink()
    add("denied", image("denied"))
    bad = add("damaged", image("damaged"))
    damage(stored(situation.store, bad.top), bad.top.size // 2)
    mine = add("mine", image("mine"))
    situation.upstream.add("team/theirs", mine)
    theirs = f"{situation.upstream.registry}/team/theirs@{mine.digest}"
    situation.names["own digest"] = f"{situation.repository('mine')}@{mine.digest}"
    other = make_upstream()
    put(situation.store, f"{other.registry}/a/b:v1", image("unlisted"), resolved=LONG_AGO)
    unlisted = {"unlisted": f"{other.registry}/a/b:v1", "unlisted absent": f"{other.registry}/a/c"}

    entry = upstream_entry(situation.upstream.url)
    tags = [{"match": "*/team/never:*", "ttl": "never"}, {"match": "*/team/always:*", "ttl": 0}]
    base: dict[str, object] = {
        "upstreams": [{**entry, "repositories": {"deny": ["team/denied"]}}],
        "tags": tags,
        "fetch": {"unlisted": "deny"},
    }
    isolated = {**base, "upstreams": [{**entry, "isolation": "repository"}]}
    # Under each configuration: what answers are expected; the server stores what it fetches.
    cases: list[tuple[dict[str, object], dict[str, tuple[int, str]]]] = [
        (
            isolated,
            {"theirs": (200, "GET"), "own digest": (200, ""), "unlisted": (403, "")},
        ),
        (
            {**base, "serve": {"offline": True}},
            {
                "absent": (404, ""),
                "fresh": (200, ""),
                "expired": (200, ""),
                "always": (200, ""),
                "named": (404, ""),
                "layer": (200, ""),
                "damaged": (404, ""),
                "theirs": (200, ""),
                "unlisted": (200, ""),
            },
        ),
        (
            base,
            {
                "fresh": (200, ""),
                "expired": (200, "HEAD"),
                "never": (200, ""),
                "always": (200, "HEAD"),
                "layer": (200, ""),
                "sparse": (200, ""),
                "denied": (403, ""),
                "absent": (200, "GET"),
                "own digest": (200, ""),
                "unlisted": (200, ""),
                "unlisted absent": (403, ""),
            },
        ),
    ]
    names = {**situation.names, **unlisted, "theirs": theirs}
    server = mirror(base, store=situation.store.root)
    for number, (config, expected) in enumerate(cases, 1):
        situation.configure(config)
        server.write_config(config)
        server.reload()
        reloaded = partial(reloads, server, number)
        server.wait_for(reloaded, "reloaded")
        told = {each: foretold(situation.why(names[each])["next"]) for each in expected}
        assert told == expected
        assert {each: done(server, situation, names[each]) for each in expected} == expected


def test_what_is_stored_is_said(situation: Situation) -> None:
    many = {each: image("app", platform=each) for each in (AMD64, ARM64)}
    situation.add("app", index(many))
    name = situation.name("app")
    assert situation.why(name)["state"] == "whole"
    assert situation.screen(name)["cached"].startswith("yes: linux/amd64, linux/arm64, ")
    stored(situation.store, many[ARM64].layers[0]).unlink()
    assert situation.screen(name)["cached"].startswith("not all of it: linux/amd64, not linux/")
    (missing,) = situation.why(name)["missing"]
    assert missing == {"digest": many[ARM64].layers[0].digest, "reason": "layer not stored"}
    assert "(1, " in situation.why(name)["next"][1]
    stored(situation.store, many[ARM64].top).unlink()
    found = situation.why(name)
    assert (found["state"], found["absentPlatforms"]) == ("whole", [ARM64])
    assert found["next"][1].startswith(f"What a client of {ARM64} needs is fetched")


def test_a_tag_of_a_clock_that_was_set_back_is_said(situation: Situation) -> None:
    situation.add("app", image("app"))
    future = time.time() + 10 * 365 * 86400
    put(situation.store, situation.name("app"), image("app"), resolved=future)
    assert situation.screen(situation.name("app"))["tag"].endswith("was the clock set back?")
    assert situation.why(situation.name("app"))["next"][0].startswith("One HEAD asks")


def test_the_rule_that_decides_is_named(situation: Situation) -> None:
    situation.add("app", image("app"), fresh=False)
    name = situation.name("app")
    assert situation.screen(name)["tag"] == (
        "resolved at 1970-01-12T13:46:40Z, expired since 1970-01-12T14:01:40Z (fetch.tag_ttl: 15m)"
    )
    situation.configure({"tags": [{"match": "*/team/*", "ttl": "never"}]})
    assert situation.screen(name)["tag"].endswith('fresh for ever (tags has "*/team/*")')
    situation.configure({"upstreams": [upstream_entry(situation.upstream.url)]})
    assert situation.screen(name)["upstream"] == f"{situation.upstream.url} (listed in upstreams)"
    situation.configure({"fetch": {"unlisted": "deny"}})
    assert "fetch.unlisted is deny" in situation.screen(name)["upstream"]


def test_what_keeps_an_image_is_named(situation: Situation) -> None:
    made = situation.add("app", (whole := multi_platform("app")))
    put(situation.store, "quay.io/other/app:v2", made)
    signature = artifact(made.top)
    put(situation.store, f"{situation.repository('app')}@{signature.digest}", signature)
    pattern = f"{situation.upstream.registry}/team/*"
    images = situation.config.with_name("images.txt")
    images.write_text(f"# all\n{situation.name('other')}\n{situation.name('app')}@{made.digest}\n")
    entries = [{"images": [pattern], "window": "01:00-05:00"}, {"images": str(images)}]
    situation.configure({"store": {"pins": [pattern]}, "sync": entries})
    found = situation.why(situation.name("app"))
    assert found["same"] == ["quay.io/other/app:v2"]
    assert found["pins"] == [{"pattern": pattern, "by": "store.pins"}]
    assert found["referrers"] == 1
    assert [each["sync"] for each in found["sync"]] == [pattern, str(images)]
    assert all(each["next"].endswith("Z") for each in found["sync"])
    assert len(situation.why(situation.name("third"))["sync"]) == 1
    child = f"{situation.repository('app')}@{whole.manifests[0].digest}"
    assert situation.why(child)["partOf"] == [whole.digest]
    lines = situation.screen(situation.name("app"))
    assert lines["same as"] == "quay.io/other/app:v2"
    assert lines["pinned"] == f"by store.pins: {pattern}"


def test_attestations_that_are_missing_are_said(situation: Situation) -> None:
    made, about = attested_index({AMD64: image("app")})
    situation.add("app", made)
    stored(situation.store, about[AMD64].top).unlink()
    found = situation.why(situation.name("app"))
    assert (found["state"], found["unstoredAttestations"]) == ("whole", [about[AMD64].digest])


def test_a_tag_with_a_digest_is_the_digest(situation: Situation) -> None:
    old = situation.add("app", image("old"))
    situation.add("app", image("new"))
    found = situation.why(f"{situation.name('app')}@{old.digest}")
    assert (found["state"], found["digest"], found["ttl"]) == ("whole", old.digest, None)


def test_isolation_withholds_what_another_repository_has(situation: Situation) -> None:
    many = multi_platform("app")
    situation.add("app", many)
    situation.configure(
        {"upstreams": [upstream_entry(situation.upstream.url, isolation="repository")]}
    )
    theirs = f"{situation.upstream.registry}/team/theirs@{many.digest}"
    assert situation.why(theirs)["state"] == "withheld"
    assert "other repositories" in situation.screen(theirs)["cached"]
    layer = image("app").layers[0]
    put(situation.store, situation.name("one"), image("app"))
    own = f"{situation.repository('one')}@{layer.digest}"
    assert situation.why(own)["state"] == "blob"
    assert situation.screen(own)["next"].startswith("The blob is answered from the store")
    assert situation.why(own.replace("/one@", "/other@"))["state"] == "withheld"


def test_a_platform_cannot_write_to_the_terminal(situation: Situation) -> None:
    situation.add("app", image("app", platform="linux/amd\x1b[31m64"))
    assert "linux/amd?[31m64" in situation.screen(situation.name("app"))["cached"]


@pytest.mark.parametrize("reference", ["a b", "https://quay.io/x", "0" * 64, ""])
def test_what_is_no_reference_is_refused(situation: Situation, reference: str) -> None:
    done = situation.run(reference)
    assert (done.exit_code, done.stdout) == (2, "")


def test_asking_is_no_use(situation: Situation) -> None:
    made = situation.add("app", image("app"))
    files = [stored(situation.store, each) for each in made.all_content()]
    for each in files:
        os.utime(each, ns=(1, each.stat().st_mtime_ns))
    situation.why(situation.name("app"))
    assert {each.stat().st_atime_ns for each in files} == {1}
    assert situation.upstream.requests == []


def test_a_running_server_adds_what_the_last_request_got(
    situation: Situation, upstream: FakeUpstream, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    situation.add("app", image("app"))
    config: dict[str, Any] = {"upstreams": [upstream_entry(upstream.url)]}
    server = mirror(config, store=situation.store.root, admin=True)
    situation.configure({**config, "serve": {"admin": {"port": server.admin_port}}})
    name = situation.name("app")
    server.wait_for(lambda: situation.why(name)["server"] is not None, "the server found")
    assert "not among the last requests" in situation.screen(name)["asked"]
    assert server.manifest(upstream.registry, "team/app", "v1").status == 200
    server.wait_for(lambda: situation.why(name)["server"]["request"], "the request told of")
    lines = situation.screen(name)
    assert " by 127.0.0.1: GET, 200 hit, " in lines["asked"]
    assert lines["now"] == f"the server has {upstream.registry} asked when needed"

    upstream.stop_listening()
    assert server.manifest(upstream.registry, "team/lost", "v1").status == 502
    lost = situation.name("lost")
    server.wait_for(lambda: "left alone" in situation.screen(lost)["now"], "left alone")
    assert ": GET, 502 error, " in situation.screen(lost)["asked"]

    # A server of another store knows nothing of this one, unless the user names it.
    other = Situation(tmp_path / "other", upstream)
    other.configure({"serve": {"admin": {"port": server.admin_port}}})
    assert other.why(name)["server"] is None
    url = f"http://127.0.0.1:{server.admin_port}"
    assert (
        f"It does list {upstream.registry} in upstreams" in other.run(name, "--server", url).stdout
    )
    assert "It does" not in situation.run(name, "--server", url).stdout
    assert json.loads(other.run(name, "--server", url, "--json").stdout)["server"]["request"]
    server.stop()
    assert situation.why(name)["server"] is None
    done = situation.run(name, "--server", url)
    assert (done.exit_code, "connection refused" in done.stderr) == (75, True)


def test_the_last_use_is_that_of_any_part_of_the_image_as_in_a_list(situation: Situation) -> None:
    made = multi_platform("used")
    situation.add("used", made)
    root = situation.store.root
    for path in (each for folder in ("img", "fat", "blobs") for each in (root / folder).iterdir()):
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    layer = stored(situation.store, made.layers[0])
    os.utime(layer, ns=(10**18 + 500 * 10**9, layer.stat().st_mtime_ns))
    words = ["list", "--format", "json", "--image-path", str(root)]
    [listed] = json.loads(CliRunner().invoke(main, words).stdout)
    told = situation.why(situation.name("used"))["lastUsed"]
    assert told == listed["lastUsed"] == "2001-09-09T01:55:00Z"
