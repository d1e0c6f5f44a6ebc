"""The configuration file: what is read, what is refused and where, its schema, its page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import pytest
import trustme
import yaml

from ociproxy.config.file import ConfigFileInvalid, parse_config, read_config, schema
from ociproxy.config.kinds import Kind
from ociproxy.config.local_settings import Admin, Log, Serve, Store
from ociproxy.config.sections import Either, Items, Key, Section
from ociproxy.config.settings import (
    Auth,
    Config,
    Endpoint,
    Fetch,
    Rules,
    Secret,
    TagRule,
    Timeouts,
    Tls,
    Unlisted,
    Upstream,
)
from ociproxy.config.table import ROOT
from ociproxy.config.units import parse_size, show_duration, show_size
from ociproxy.config.yaml import SIZE_LIMIT
from ociproxy.errors import ConfigError
from ociproxy.oci.reference import Reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"

EVERYTHING = """
store: {path: /srv/store, hot_manifests: 1MiB}
serve:
  host: "::"
  port: 0
  default_upstream: ""
  offline: true
  workers: 2
  shutdown_grace: 1m
  header_limit: 8KiB
  line_limit: 4096
fetch:
  timeouts: {connect: 1s, headers: 2, stall: 2.5s, revalidate: 500ms, answer: 10s}
  fills: 8
  background_fills: 0
  requests: 3
  segment: 64MiB
  connections: 2
  retries: 1
  retry_wait_max: 1s
  tag_ttl: 1h
  negative_ttl: 0
  pause: 5s
  unlisted: {scheme: auto, policy: allow, deny_private: true, repositories: {deny: [x.example/*]}}
tags:
  - {match: "*:latest", ttl: 0}
  - {match: "quay.io/*", ttl: never}
upstreams:
  - name: index.docker.io
    description: the hub
    auth: {user: me, password: "12345"}
    timeouts: {stall: 1m}
    repositories: {allow: ["library/*", "a/b"], deny: ["library/x*"]}
  - name: Localhost:5000
    scheme: http
    connections: 1
    backend: oras
  - name: quay.io
    endpoint: https://CACHE.example/quay/
    tls: {insecure_skip_verify: true}
  - name: hub.example
    auth: {user: me, password: own}
    endpoints:
      - http://MIRROR.example:8080/
      - {url: "https://harbor.example/hub", auth: {user: robot, password: its}, ns: true}
      - https://hub.example:443
log: {level: trace, format: json}
"""


def problems(text: str, folder: Path = Path()) -> list[str]:
    """`line: key: reason` of each problem."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, str(folder / "config.yaml"))
    assert caught.value.exit_code == 2
    prefix = str(folder / "config.yaml") + ":"
    lines = str(caught.value).splitlines()
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


def test_every_key_of_the_mapping_is_read() -> None:
    timeouts = Timeouts(connect=1.0, headers=2.0, stall=2.5, revalidate=0.5, answer=10.0)
    assert parse_config(EVERYTHING, "config.yaml") == Config(
        store=Store(path=Path("/srv/store"), hot_manifests=1024**2),
        serve=Serve(
            host="::",
            port=0,
            default_upstream="",
            offline=True,
            workers=2,
            shutdown_grace=60.0,
            header_limit=8192,
            line_limit=4096,
        ),
        fetch=Fetch(
            timeouts=timeouts,
            fills=8,
            background_fills=0,
            requests=3,
            segment=64 * 1024**2,
            connections=2,
            retries=1,
            retry_wait_max=1.0,
            tag_ttl=3600.0,
            negative_ttl=0.0,
            pause=5.0,
            unlisted=Unlisted(
                scheme="auto", deny_private=True, repositories=Rules(deny=("x.example/*",))
            ),
        ),
        tags=(TagRule(match="*:latest", ttl=0.0), TagRule(match="quay.io/*", ttl=None)),
        upstreams={
            "docker.io": Upstream(
                name="docker.io",
                description="the hub",
                auth=Auth(user="me", password=Secret("12345")),
                timeouts=dataclasses.replace(timeouts, stall=60.0),
                connections=2,
                repositories=Rules(allow=("library/*", "a/b"), deny=("library/x*",)),
            ),
            "localhost:5000": Upstream(
                name="localhost:5000", scheme="http", timeouts=timeouts, connections=1
            ),
            "quay.io": Upstream(
                name="quay.io",
                endpoint="https://cache.example/quay",
                tls=Tls(insecure_skip_verify=True),
                timeouts=timeouts,
                connections=2,
            ),
            "hub.example": Upstream(
                name="hub.example",
                auth=Auth(user="me", password=Secret("own")),
                endpoints=(
                    Endpoint(url="http://mirror.example:8080"),
                    Endpoint(
                        url="https://harbor.example/hub",
                        auth=Auth(user="robot", password=Secret("its")),
                        ns=True,
                    ),
                    Endpoint(url="https://hub.example:443"),
                ),
                timeouts=timeouts,
                connections=2,
            ),
        },
        log=Log(level="trace", format="json"),
    )


def test_classic_list_is_upstreams_only() -> None:
    config = parse_config(
        "- name: quay.io\n  description: x\n  auth: {user: u, password: p}\n- name: docker.io\n",
        "config.yaml",
    )
    assert list(config.upstreams) == ["quay.io", "docker.io"]
    assert dataclasses.replace(config, upstreams={}) == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "[]", "\ufeff"])
def test_nothing_is_all_defaults(text: str) -> None:
    assert parse_config(text, "config.yaml") == Config()


def test_urls_of_an_upstream() -> None:
    assert Upstream(name="docker.io").urls == ("https://registry-1.docker.io",)
    assert Upstream(name="a:1", scheme="auto").urls == ("https://a:1", "http://a:1")
    assert Upstream(name="a", endpoint="http://b").urls == ("http://b",)


def test_credentials_go_to_the_endpoint_that_they_are_written_for() -> None:
    own, its = Auth(user="own", password=Secret("x")), Auth(user="its", password=Secret("y"))
    tls = Tls(insecure_skip_verify=True)
    upstream = Upstream(
        name="docker.io",
        auth=own,
        tls=tls,
        endpoints=(
            Endpoint(url="https://mirror.example"),
            Endpoint(url="https://harbor.example", auth=its),
            Endpoint(url="http://registry-1.docker.io"),
            Endpoint(url="https://REGISTRY-1.docker.io:443".lower()),
            Endpoint(url="https://registry-1.docker.io:5000"),
            Endpoint(url="https://registry-1.docker.io.evil.example"),
        ),
    )
    each = upstream.each_endpoint
    assert [e.auth for e in each] == [None, its, None, own, None, None]
    assert [e.tls for e in each] == [Tls(), Tls(), tls, tls, Tls(), Tls()]
    assert [e.server for e in each] == [
        "mirror.example",
        "harbor.example",
        "docker.io",
        "docker.io",
        "registry-1.docker.io:5000",
        "registry-1.docker.io.evil.example",
    ]
    plain = Upstream(name="a:1", auth=own, endpoints=(Endpoint(url="http://a:1"),))
    assert [e.auth for e in plain.each_endpoint] == [own]


@pytest.mark.parametrize(
    ("endpoint", "ns", "expected"),
    [
        (None, None, None),
        ("https://registry-1.docker.io", None, None),
        ("https://mirror.example", None, "docker.io"),
        ("https://mirror.example/v2", None, "docker.io"),
        ("https://harbor.example/hub", None, None),
        ("https://harbor.example/hub", True, "docker.io"),
        ("https://mirror.example", False, None),
    ],
)
def test_a_mirror_of_many_registries_is_told_which(
    endpoint: str | None, ns: bool | None, expected: str | None
) -> None:
    assert Upstream(name="docker.io", endpoint=endpoint, ns=ns).namespace == expected


def test_unlisted_upstream_has_the_bounds_of_fetch() -> None:
    config = parse_config("fetch: {connections: 1, timeouts: {connect: 1s}}", "config.yaml")
    upstream = config.unlisted_upstream("quay.io")
    assert upstream.auth is None
    assert not upstream.listed
    assert upstream.connections == 1
    assert upstream.timeouts.connect == 1.0


def test_unlisted_deny_is_short_for_its_policy() -> None:
    short = parse_config("fetch: {unlisted: deny}", "config.yaml")
    assert short == parse_config("fetch: {unlisted: {policy: deny}}", "config.yaml")
    assert short.fetch.unlisted == Unlisted(policy="deny")


def test_first_tag_rule_that_matches_wins() -> None:
    config = parse_config(EVERYTHING, "config.yaml")
    assert config.tag_ttl(Reference.parse("quay.io/a/b:latest")) == 0.0
    assert config.tag_ttl(Reference.parse("quay.io/a/b:v1")) is None
    assert config.tag_ttl(Reference.parse("nginx:v1")) == 3600.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("serve: {prot: 1}", "1: serve.prot: unknown key (did you mean port?)"),
        ("serve:\n  port: 1\n  port: 2", "3: serve.port: given twice, first on line 2"),
        ("serve: {port: '1'}", "1: serve.port: must be a whole number, 0 to 65535"),
        ("serve: {port: 65536}", "1: serve.port: must be 0 to 65535, not 65536"),
        ("serve: {offline: yes}", "1: serve.offline: must be true or false"),
        ("serve: []", "1: serve: must be a mapping, not a list"),
        ("serve:", "1: serve: must be a mapping, not nothing: give a value or remove the key"),
        ("serve: {host: }", "1: serve.host: must be a string: give a value or remove the key"),
        ("tags: {}", "1: tags: must be a list"),
        ("tags: [{match: nginx, ttl: 1m}]", "1: tags[0].match: matches nothing"),
        ("tags: [{match: '*'}]", "1: tags[0].ttl: is required"),
        ("tags: [{match: '*', ttl: soon}]", "1: tags[0].ttl: must be a duration"),
        ("fetch: {pause: never}", "1: fetch.pause: must be a duration"),
        ("fetch: {pause: 1:30}", "1: fetch.pause: must be a duration"),
        ("fetch: {pause: .inf}", "1: fetch.pause: must be a duration"),
        ("fetch: {pause: -1}", "1: fetch.pause: must be between 0 and 1d"),
        ("fetch: {timeouts: {answer: 21s}}", "1: fetch.timeouts.answer: must be between 50ms"),
        ("fetch: {segment: 64MX}", "1: fetch.segment: must be a size"),
        ("fetch: {segment: 1}", "1: fetch.segment: must be between 1MiB and 1TiB"),
        ("fetch: {unlisted: no}", "1: fetch.unlisted: must be allow or deny, not 'no'"),
        ("store: {max_size: 101%}", "1: store.max_size: must be 100% at most"),
        ("store: {max_size: 0}", "1: store.max_size: must be more than 0; remove the key"),
        ("store: {min_free: lots}", "1: store.min_free: must be a size such as 200G, or a perc"),
        ("store: {max_size: [1G]}", "1: store.max_size: must be a size such as 200G, or a perc"),
        ("log: {level: loud}", "1: log.level: must be trace or debug or info or warn or error"),
        ("upstreams: [{}]", "1: upstreams[0].name: is required"),
        ("- {name: a b}", "1: [0].name: not a registry name: a registry is host[:port]"),
        *(
            (
                f"- {{name: a, tls: {{{said}: x}}}}",
                f"1: [0].tls.{said}: unknown key (did you mean {meant}?)",
            )
            for said, meant in (
                ("ca_file", "ca"),
                ("cafile", "ca"),
                ("caFile", "ca"),
                ("ca-cert", "ca"),
                ("cacert", "ca"),
                ("root_ca", "ca"),
                ("certfile", "cert"),
                ("client-cert", "cert"),
                ("keyfile", "key"),
                ("insecure", "insecure_skip_verify"),
                ("insecureSkipVerify", "insecure_skip_verify"),
                ("skip_verify", "insecure_skip_verify"),
            )
        ),
        ("- {name: a, endpoint: b}", "1: [0].endpoint: must be http://HOST[:PORT][/PATH] or"),
        ("- {name: 'a:70000'}", "1: [0].name: not a registry name"),
        ("- {name: ''}", "1: [0].name: must not be empty"),
        ('- {name: a, description: "a\\nb"}', "1: [0].description: must not contain control"),
        ("- name: docker.io\n- name: index.docker.io", "2: [1]: docker.io is listed twice"),
        ("- {name: a, endpoint: 'https://u:p@b'}", "1: [0].endpoint: must be http://HOST"),
        ("- {name: a, endpoint: 'ftp://b'}", "1: [0].endpoint: must "),
        ("- {name: a, endpoint: 'https://b', scheme: https}", "1: [0].scheme: the endpoint has"),
        ("- {name: a, endpoints: ['https://b'], scheme: https}", "1: [0].scheme: endpoints has it"),
        ("- {name: a, endpoints: ['ftp://b']}", "1: [0].endpoints[0]: must"),
        ("- {name: a, endpoints: [{url: 'http://b', tls: {}}]}", "1: [0].endpoints[0].tls: has no"),
        (
            "- {name: a, endpoints: ['https://b'], auth: {user: u, password: p}}",
            "1: [0].auth: is a's own, which no endpoint is",
        ),
        ("- {name: a, scheme: http, tls: {}}", "1: [0].tls: has no use with plain http"),
        ("- {name: a, auth: {user: u}}", "1: [0].auth: needs exactly one of password, "),
        ("- {name: a, auth: {password: p}}", "1: [0].auth: password needs a user"),
        ("- {name: a, auth: {user: 'u:v', password: p}}", "1: [0].auth.user: must be a name"),
        ("- {name: a, auth: {helper: h, docker_config: true}}", "1: [0].auth: needs exactly one"),
        ("- {name: a, auth: {user: u, helper: h}}", "1: [0].auth.user: comes from helper"),
        ("- {name: a, auth: {helper: ../h}}", "1: [0].auth.helper: must be the NAME"),
        ("- {name: a, isolated: true}", "1: [0].isolated: unknown key"),
        ("- {name: a, <<: {}}", "1: [0].'<<': unknown key"),
        ("hello", "1: must be a mapping, or a list of upstreams"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_key(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(expected)


def test_all_problems_are_reported_in_the_order_of_the_file() -> None:
    found = problems("log: {level: x}\nserve:\n  nope: 1\n  port: x\nstore: {path: 1}\n")
    assert [line.split(": ")[:2] for line in found] == [
        ["1", "log.level"],
        ["3", "serve.nope"],
        ["4", "serve.port"],
        ["5", "store.path"],
    ]


def test_error_carries_the_facts_of_each_problem() -> None:
    with pytest.raises(ConfigFileInvalid) as caught:
        parse_config("a: 1\nb: 2\n", "x.yaml")
    assert (caught.value.file, caught.value.line, caught.value.key) == ("x.yaml", 1, "a")
    assert [problem.key for problem in caught.value.problems] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b: c", "1: not valid YAML: mapping values are not allowed here"),
        ("a:\n\t- x", "2: not valid YAML: "),
        ('a: "', "1: not valid YAML: "),
        ("a: *b", "1: not valid YAML: found undefined alias"),
        ("--- 1\n--- 2", "2: not valid YAML: expected a single document"),
        ("a: 1\nb: \x01", "2: character U+0001 is not allowed"),
        ("? [a]\n: b", "1: a key must be a word"),
        ("- !!python/object/apply:os.system [x]", "1: tag "),
        ("a: !!binary x", "1: tag "),
        ("a: !!int x", "1: not a number"),
        ("[" * 5000, "1: not valid YAML: nested too deeply"),
        ("a: &a [*a]", "1: aliases expand to too much"),
    ],
)
def test_text_that_is_not_yaml_is_one_line_with_a_position(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(expected)


def test_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    (problem,) = problems("\n".join(lines))
    assert "aliases expand to too much" in problem


def test_an_alias_may_share_a_section() -> None:
    text = "- {name: a, tls: &t {insecure_skip_verify: true}}\n- {name: b, tls: *t}\n"
    assert parse_config(text, "x").upstreams["b"].tls.insecure_skip_verify


def test_a_secret_is_in_no_message_and_no_repr(tmp_path: Path) -> None:
    for text in (
        "- {name: a, auth: hunter2}",
        "- {name: a, auth: {user: u, password: [hunter2]}}",
        "- {name: a, auth: {user: u, password: {hunter2: x}}}",
        "- {name: a, auth: {password: hunter2}}",
        "- {name: a, endpoint: 'https://u:hunter2@b/'}",
        '- {name: a, auth: {user: u, password: "hunter2\\u0001"}}',
    ):
        assert "hunter2" not in "".join(problems(text, tmp_path))
    config = parse_config("- {name: a, auth: {user: u, password: hunter2}}", "x")
    assert "hunter2" not in f"{config!r} {config}"
    auth = config.upstreams["a"].auth
    assert auth is not None
    assert auth.password is not None
    assert auth.password.reveal() == "hunter2"
    assert str(auth.password) == "********"


def test_variables_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHAT", "expanded")
    config = parse_config("- {name: a, description: '${WHAT}'}", "x")
    assert config.upstreams["a"].description == "${WHAT}"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("one", "two"):
        issued = authority.issue_cert(f"{name}.example")
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    (folder / "empty").touch()
    return folder


def test_relative_paths_start_at_the_folder_of_the_file(certificates: Path) -> None:
    file = certificates / "config.yaml"
    file.write_text("upstreams: [{name: a, tls: {ca: ca.pem, cert: one.pem, key: one.key}}]")
    tls = read_config(file).upstreams["a"].tls
    assert tls == Tls(
        ca=certificates / "ca.pem", cert=certificates / "one.pem", key=certificates / "one.key"
    )


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ("{ca: /nope}", "upstreams[0].tls.ca: no such file: /nope"),
        ("{ca: /}", "upstreams[0].tls.ca: cannot be read: /: Is a directory"),
        ("{ca: empty}", "upstreams[0].tls.ca: no PEM certificate in it"),
        ("{ca: one.key}", "upstreams[0].tls.ca: no PEM certificate in it"),
        ("{cert: one.pem}", "upstreams[0].tls.cert: needs key"),
        ("{key: one.key}", "upstreams[0].tls.key: needs cert"),
        ("{cert: one.pem, key: two.key}", "upstreams[0].tls.key: not the key of the certificate"),
        ("{cert: empty, key: one.key}", "upstreams[0].tls.cert: with its key not usable"),
    ],
)
def test_files_of_a_tls_section_are_looked_at(certificates: Path, tls: str, expected: str) -> None:
    (problem,) = problems(f"upstreams:\n- name: a\n  tls: {tls}\n", certificates)
    assert problem.startswith(f"3: {expected}")


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ("{cert: one.pem}", "serve.tls.key: is required"),
        ("{cert: one.pem, key: two.key}", "serve.tls.key: not the key of the certificate"),
        ("{cert: empty, key: one.key}", "serve.tls.cert: with its key not usable"),
        (
            "{cert: one.pem, key: one.key, client_ca: one.key}",
            "serve.tls.client_ca: no PEM certificate in it",
        ),
        ("{}", "serve.tls.cert: is required"),
    ],
)
def test_files_of_the_servers_own_tls_are_looked_at(
    certificates: Path, tls: str, expected: str
) -> None:
    problem, *_ = problems(f"serve:\n  port: 1\n  tls: {tls}\n", certificates)
    assert problem.startswith(f"3: {expected}")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("fd00::/8", "fd00::/8"),
        ("::1", "::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_networks_are_read(written: str, read: str) -> None:
    config = parse_config(f'serve: {{networks: ["{written}"]}}', "x")
    assert [str(network) for network in config.serve.networks] == [read]


@pytest.mark.parametrize("written", ["10.0.0.1/8", "10.0.0.0/33", "localhost", "10.0.0", "::g"])
def test_what_is_no_network_is_refused(written: str) -> None:
    (problem,) = problems(f'serve: {{networks: ["{written}"]}}')
    assert problem.startswith("1: serve.networks[0]: not a network such as 10.0.0.0/8 or fd00::/8")


def test_missing_password_file_is_refused() -> None:
    (problem,) = problems("- {name: a, auth: {user: u, password_file: /nope}}")
    assert problem == "1: [0].auth.password_file: no such file: /nope"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_text("#" * (SIZE_LIMIT + 1))
    for path, reason in (
        (tmp_path / "nope.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (latin, "not UTF-8"),
        (large, f"larger than {SIZE_LIMIT} bytes"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
            read_config(path)
        assert str(caught.value).startswith(str(path))


# A schema cannot say these: uniqueness, files, rules between keys.
@pytest.mark.parametrize(
    "text",
    [EVERYTHING, "[]", "", "- {name: a, auth: {docker_config: true}}", "fetch: {unlisted: deny}"],
)
def test_schema_accepts_what_is_read(text: str) -> None:
    parse_config(text, "x")
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(yaml.safe_load(text), schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "text",
    [
        "serve: {prot: 1}",
        "serve: {port: '1'}",
        "serve: {port: 65536}",
        "serve: []",
        "tags: [{match: '*'}]",
        "fetch: {pause: never}",
        "fetch: {segment: 64MX}",
        "fetch: {unlisted: maybe}",
        "- {name: 1}",
        "- {description: x}",
        "- {name: a, tls: {cert: x}}",
        "hello",
    ],
)
def test_schema_refuses_what_is_refused(text: str) -> None:
    problems(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema(), jsonschema.Draft202012Validator)


def sections(kind: Kind) -> Iterator[Section]:
    match kind:
        case Section():
            yield kind
            for key in kind.keys.values():
                yield from sections(key.kind)
        case Items():
            yield from sections(kind.kind)
        case Either():
            yield from sections(kind.first)
        case _:
            return


def test_table_and_dataclasses_have_the_same_keys() -> None:
    # Whether an upstream is listed, and what follows from that, is not for its entry to say.
    internal = {Upstream: {"listed", "deny_private", "ns"}, Admin: {"chosen"}}
    for section in sections(ROOT):
        fields = {field.name for field in dataclasses.fields(section.shape)}
        assert set(section.keys) == fields - internal.get(section.shape, set())
        assert set(get_type_hints(section.shape)) == fields


def keys(kind: Kind, path: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Each key as the documentation names it, with its default."""
    match kind:
        case Items():
            yield from keys(kind.kind, f"{path}[]")
        case Either():
            yield from keys(kind.first, path)
        case Section():
            properties = kind.schema()["properties"]
            for name, key in kind.keys.items():
                child = f"{path}.{name}".lstrip(".")
                yield child, key, properties[name].get("default", "")
                yield from keys(key.kind, child)
        case _:
            return


@pytest.mark.parametrize(("path", "key", "default"), [*keys(ROOT)])
def test_every_key_is_documented_with_its_default(path: str, key: Key, default: Any) -> None:
    (row,) = re.findall(
        rf"^\| `{re.escape(path)}` \| (.+?) \|(.*?)\|(.+)\|$", DOCUMENT.read_text(), re.MULTILINE
    )
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    wanted = "required" if key.required else f"`{shown}`" if shown else ""
    assert key.inherited or row[1].strip() == wanted


def test_examples_of_the_documentation_are_valid(tmp_path: Path) -> None:
    examples = re.findall(r"^```yaml\n(.+?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 9
    for example in examples:
        # The files it names are not on this machine.
        text = re.sub(r"tls: \{ca.+\}", "tls: {}", example)
        text = re.sub(r"  (tls: \{cert|auth: \{htpasswd).+\n", "", text)
        text = re.sub(r"/run/secrets/\w+|/etc/ociproxy/\w+\.txt", str(DOCUMENT), text)
        parse_config(text, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0"), (0.5, "500ms"), (90.0, "90s"), (3600.0, "1h"), (86400.0, "1d")],
)
def test_durations_are_shown_as_written(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


def test_sizes_are_shown_as_written() -> None:
    assert [show_size(size) for size in (0, 1000, 1024, 3 * 1024**3)] == [
        "0",
        "1K",
        "1KiB",
        "3GiB",
    ]
    assert [show_size(size) for size in (20_000_000, 1_258_291)] == ["20M", "1258291"]
    assert parse_size(show_size(20_000_000)) == 20_000_000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("700M", 700_000_000),
        ("4.7GB", 4_700_000_000),
        ("32MiB", 32 * 1024**2),
        ("1.5Ki", 1536),
        ("1.5", None),
        ("4,7G", None),
        ("M", None),
        ("-1M", None),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int | None) -> None:
    assert parse_size(text) == size


# skopeo


def test_skopeo_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = "- name: quay.io\n- name: ghcr.io\n  backend: skopeo\n"
    with pytest.raises(ConfigError, match="apt-get install skopeo") as caught:
        parse_config(text, "config.yaml")
    assert (caught.value.line, caught.value.key) == (3, "[1].backend")
    (tmp_path / "skopeo").touch(0o755)
    assert parse_config(text, "config.yaml").upstreams["ghcr.io"].backend == "skopeo"
    with pytest.raises(ConfigError, match="say https or http") as caught:
        parse_config(text + "  scheme: auto\n", "config.yaml")
    assert caught.value.line == 4
