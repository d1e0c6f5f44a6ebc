"""Every way to reach, trust and authenticate with an upstream, in every combination.

nginx terminates TLS in front of a docker-registry, or of a fake upstream where tokens are given
out. Each way of trusting has an authority of its own, so that none works by another's trust.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.images import Image, image
from tests.parts.certificates import Authority
from tests.parts.nginx import Nginx, Site
from tests.parts.registry import Registry
from tests.server import Mirror
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth

USER, PASSWORD = "ann", "p:w d"
TRUSTS = ("os trust", "own ca", "unverified")
TRANSPORTS = ("http", *TRUSTS, *(f"mTLS {trust}" for trust in TRUSTS))
AUTHS = ("anonymous", "basic", "bearer anonymous", "bearer with credentials")
NAMINGS = ("name", "name:port", "endpoint")
PORT = 5000
CAN_BIND = os.geteuid() == 0
FAILURE_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class Cell:
    number: int
    transport: str
    auth: str
    naming: str

    def __str__(self) -> str:
        return f"{self.transport}-{self.auth}-{self.naming}"

    @property
    def address(self) -> str:
        """One for each transport and authentication."""
        return f"127.0.1.{self.number // len(NAMINGS) + 1}"

    @property
    def trust(self) -> str:
        return self.transport.removeprefix("mTLS ")

    @property
    def scheme(self) -> str:
        return "http" if self.transport == "http" else "https"

    @property
    def host(self) -> str:
        return self.address if self.naming == "name" else f"{self.address}:{PORT}"

    @property
    def registry(self) -> str:
        return f"cell-{self.number}.example" if self.naming == "endpoint" else self.host

    @property
    def repository(self) -> str:
        return f"team/cell-{self.number}"

    @property
    def image(self) -> Image:
        return image(f"cell {self.number}", layer_size=100)

    def entry(self, authorities: dict[str, Authority]) -> dict[str, Any]:
        """What an operator would write for it."""
        entry: dict[str, Any] = {"name": self.registry}
        if self.naming == "endpoint":
            entry["endpoint"] = f"{self.scheme}://{self.host}"
        elif self.scheme == "http":
            entry["scheme"] = "http"
        tls: dict[str, Any] = {}
        if self.transport.startswith("mTLS"):
            authority = authorities[self.trust]
            tls |= {"cert": str(authority.client_cert), "key": str(authority.client_key)}
        if self.trust == "own ca":
            tls["ca"] = str(authorities[self.trust].ca)
        if self.trust == "unverified":
            tls["insecure_skip_verify"] = True
        if tls:
            entry["tls"] = tls
        if self.auth in ("basic", "bearer with credentials"):
            entry["auth"] = {"user": USER, "password": PASSWORD}
        return entry


CELLS = [
    Cell(number, *kinds)
    for number, kinds in enumerate(itertools.product(TRANSPORTS, AUTHS, NAMINGS))
]
EXPIRED = "127.0.1.100"


@dataclass(frozen=True, slots=True)
class Matrix:
    server: Mirror
    authorities: dict[str, Authority]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("matrix")
    addresses = sorted({cell.address for cell in CELLS})
    authorities = {
        trust: Authority(folder / trust.replace(" ", "-"), *addresses) for trust in TRUSTS
    }
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    expired = Authority(folder / "expired", EXPIRED, valid_until=yesterday)
    authorities["expired"] = expired
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(Registry(folder / "plain"))
        basic = stack.enter_context(Registry(folder / "basic", credentials=(USER, PASSWORD)))
        tokens = stack.enter_context(FakeUpstream())
        sites = {}
        for cell in CELLS:
            target = {"anonymous": plain.name, "basic": basic.name}.get(cell.auth, tokens.registry)
            sites[cell.address] = Site(
                cell.address,
                (PORT, 443 if cell.scheme == "https" else 80) if CAN_BIND else (PORT,),
                target,
                tls=authorities.get(cell.trust),
                ask_client=cell.transport.startswith("mTLS"),
            )
            if cell.auth in ("anonymous", "basic"):
                held_by = plain if cell.auth == "anonymous" else basic
                held_by.push(cell.repository, cell.image, tag="v1")
            else:
                known = BasicAuth(USER, PASSWORD) if cell.auth != "bearer anonymous" else None
                realm = f"{cell.scheme}://{cell.host}/token"
                tokens.protect(cell.repository, TokenAuth(credentials=known, realm=realm))
                tokens.add(cell.repository, cell.image, tag="v1")
        sites[EXPIRED] = Site(EXPIRED, (PORT,), plain.name, tls=expired)
        stack.enter_context(Nginx(folder / "nginx", list(sites.values())))
        config = {
            "fetch": {"unlisted": "deny"},
            "upstreams": [cell.entry(authorities) for cell in CELLS],
        }
        env = {"SSL_CERT_FILE": str(authorities["os trust"].ca)}
        server = Mirror(folder / "mirror", config, env=env)
        server.start()
        try:
            yield Matrix(server, authorities)
            server.stop()
            assert "Traceback" not in server.log()
            assert PASSWORD not in server.log()
        finally:
            server.kill()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_an_image_is_pulled(matrix: Matrix, cell: Cell) -> None:
    if cell.naming == "name" and not CAN_BIND:
        pytest.skip("ports 80 and 443 need root")
    server, expected = matrix.server, cell.image
    answer = server.manifest(cell.registry, cell.repository, "v1")
    assert (answer.status, answer.body) == (200, expected.top.data), answer.body
    for blob in expected.blobs:
        assert server.blob(cell.registry, cell.repository, blob.digest).body == blob.data


def cell_of(transport: str, auth: str) -> Cell:
    wanted = (transport, auth, "name:port")
    return next(cell for cell in CELLS if (cell.transport, cell.auth, cell.naming) == wanted)


def wrong(matrix: Matrix, case: str) -> tuple[dict[str, Any], str, int, str]:
    """An entry that does not fit its upstream, the repository, the status and the reason."""
    authorities = matrix.authorities
    cell = {
        "wrong password": cell_of("http", "basic"),
        "wrong password for tokens": cell_of("own ca", "bearer with credentials"),
        "no password": cell_of("own ca", "basic"),
    }.get(case, cell_of("own ca", "anonymous"))
    entry = cell.entry(authorities)
    if case.startswith("wrong password"):
        entry["auth"]["password"] = "another"
        return entry, cell.repository, 403, "answered 401"
    if case == "no password":
        del entry["auth"]
        return entry, cell.repository, 403, "answered 401"
    if case == "another authority":
        entry["tls"]["ca"] = str(authorities["unverified"].ca)
        return entry, cell.repository, 502, "certificate verify failed"
    if case == "the os does not know it":
        del entry["tls"]
        return entry, cell.repository, 502, "certificate verify failed"
    if case == "expired":
        entry = {"name": f"{EXPIRED}:{PORT}", "tls": {"ca": str(authorities["expired"].ca)}}
        return entry, cell.repository, 502, "certificate has expired"
    if case == "plain http where https is said":
        cell = cell_of("http", "anonymous")
        return {"name": cell.registry}, cell.repository, 502, "TLS failed"
    # nginx takes the handshake, and then refuses the request.
    cell = cell_of("mTLS own ca", "anonymous")
    entry = cell.entry(authorities)
    if case == "no client certificate":
        entry["tls"] = {"ca": entry["tls"]["ca"]}
    else:
        stranger = authorities["unverified"]
        entry["tls"] |= {"cert": str(stranger.client_cert), "key": str(stranger.client_key)}
    return entry, cell.repository, 502, "answered 400"


@pytest.mark.parametrize(
    "case",
    [
        "wrong password",
        "wrong password for tokens",
        "no password",
        "another authority",
        "the os does not know it",
        "expired",
        "plain http where https is said",
        "no client certificate",
        "a stranger's client certificate",
    ],
)
def test_what_does_not_fit_is_said_soon(matrix: Matrix, tmp_path: Path, case: str) -> None:
    entry, repository, status, reason = wrong(matrix, case)
    server = Mirror(tmp_path / "mirror", [entry], env=matrix.server.env)
    server.start()
    try:
        began = time.monotonic()
        answer = server.manifest(entry["name"], repository, "v1")
        took = time.monotonic() - began
        server.stop()
    finally:
        server.kill()
    assert answer.status == status, answer.body
    message = answer.json()["errors"][0]["message"]
    assert entry["name"] in message
    assert reason in message
    assert took < FAILURE_LIMIT
