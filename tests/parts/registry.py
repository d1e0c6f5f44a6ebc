"""Debian's docker-registry as a real upstream: plain, with basic auth, over TLS, over mTLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import requests
import yaml

from tests.images import Content, Image
from tests.parts.certificates import Authority
from tests.parts.tools import Daemon, require_tool, run

LISTENING = r"listening on (?:127\.0\.0\.1|\[::\]):(\d+)"


class Registry:
    """Storage lies in `folder` and outlives `stop`; `start` again listens on the same port."""

    def __init__(
        self,
        folder: Path,
        *,
        credentials: tuple[str, str] | None = None,
        tls: Authority | None = None,
        ask_client: bool = False,
        proxy_of: str | None = None,
    ) -> None:
        program = require_tool("docker-registry")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, 0
        self.credentials, self.tls = credentials, tls
        self._ask_client, self._proxy_of = ask_client, proxy_of
        self._config = folder / "config.yml"
        self._daemon = Daemon([program, "serve", self._config], folder / "log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._config.write_text(yaml.safe_dump(self._settings()), encoding="utf-8")
        self.port = int(self._daemon.start(LISTENING)[1])

    def stop(self) -> None:
        self._daemon.stop()

    @property
    def name(self) -> str:
        """The registry's name in references."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.name}"

    def log(self) -> str:
        return self._daemon.log()

    def push(self, repository: str, image: Image, *, tag: str) -> Image:
        """Blobs, children, then the tag; what the registry then serves is compared to it."""
        with self._session() as session:
            for blob in image.blobs:
                self._push_blob(session, repository, blob)
            for child in image.manifests:
                self._push_manifest(session, repository, child, child.digest)
            self._push_manifest(session, repository, image.top, tag)
        return image

    def _push_blob(self, session: requests.Session, repository: str, blob: Content) -> None:
        base = f"{self.url}/v2/{repository}/blobs"
        begun = session.post(f"{base}/uploads/", timeout=10)
        begun.raise_for_status()
        where = begun.headers["Location"]
        session.put(
            where, params={"digest": blob.digest}, data=blob.data, timeout=60
        ).raise_for_status()
        held = session.head(f"{base}/{blob.digest}", timeout=10)
        assert held.headers["Content-Length"] == str(blob.size)

    def _push_manifest(
        self, session: requests.Session, repository: str, manifest: Content, reference: str
    ) -> None:
        url = f"{self.url}/v2/{repository}/manifests/{reference}"
        media_type = {"Content-Type": manifest.media_type}
        session.put(url, data=manifest.data, headers=media_type, timeout=10).raise_for_status()
        held = session.get(url, headers={"Accept": manifest.media_type}, timeout=10)
        assert (held.status_code, held.content) == (200, manifest.data)
        assert held.headers["Docker-Content-Digest"] == manifest.digest

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.auth = self.credentials
        if self.tls is not None:
            session.verify = str(self.tls.ca)
            session.cert = (str(self.tls.client_cert), str(self.tls.client_key))
        return session

    def _settings(self) -> dict[str, Any]:
        http: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}", "secret": "tests"}
        if self.tls is not None:
            http["tls"] = {"certificate": str(self.tls.cert), "key": str(self.tls.key)}
            if self._ask_client:
                http["tls"]["clientcas"] = [str(self.tls.ca)]
        settings: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.folder / "storage")}},
            "http": http,
        }
        if self.credentials is not None:
            settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(self._htpasswd())}}
        if self._proxy_of is not None:
            settings["proxy"] = {"remoteurl": self._proxy_of}
        return settings

    def _htpasswd(self) -> Path:
        assert self.credentials is not None
        path = self.folder / "htpasswd"
        # Cost 4: the registry hashes on every request, and tests need no strength.
        line = run(require_tool("htpasswd"), "-nbB", "-C", "4", *self.credentials).stdout
        path.write_bytes(line)
        return path
