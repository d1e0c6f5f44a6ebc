"""containerd with its own root, state and socket, as a node's runtime; pulls by `ctr`."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Self

from tests.images import Image
from tests.parts.tools import Daemon, require_root, require_tool, run

CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]

[grpc]
  address = "{folder}/sock"
"""


class Containerd:
    """A fresh, empty one; `pull` asks the mirror that `use_mirror` named for every registry."""

    def __init__(self) -> None:
        require_root()
        self._program, self._ctr = require_tool("containerd"), require_tool("ctr")
        # A unix socket's path has 107 bytes at most, and pytest's folders are long.
        self.folder = Path(tempfile.mkdtemp(prefix="ctrd-", dir="/tmp"))
        self.hosts = self.folder / "certs.d"
        config = self.folder / "config.toml"
        config.write_text(CONFIG.format(folder=self.folder), encoding="utf-8")
        self._daemon = Daemon([self._program, "--config", config], self.folder / "log")

    def __enter__(self) -> Self:
        self._daemon.start(r"containerd successfully booted")
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()
        # What a killed pull or container left mounted would keep the folder.
        mounts = Path("/proc/mounts").read_text(encoding="utf-8")
        for at in re.findall(rf"\S+ ({re.escape(str(self.folder))}/\S+)", mounts):
            run("umount", "-l", at, check=False)
        shutil.rmtree(self.folder)

    def use_printed(self, url: str, *options: str) -> None:
        """The file that `ociproxy client-config containerd` makes for a mirror at this URL."""
        place = self.folder / "printed"
        options = ("--mirror", url, "--write", str(place), *options)
        run(sys.executable, "-m", "ociproxy", "client-config", "containerd", *options)
        shutil.copytree(place / "etc" / "containerd" / "certs.d", self.hosts, dirs_exist_ok=True)

    def use_mirror(self, url: str, *more: str) -> None:
        """The one file a node needs: this mirror for everything, asked with `?ns=`.

        `more` are further lines about this host.
        """
        folder = self.hosts / "_default"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f'[host."{url}"]', '  capabilities = ["pull", "resolve"]', *more]
        text = "".join(f"{line}\n" for line in lines)
        (folder / "hosts.toml").write_text(text, encoding="utf-8")

    def pull_by_2(self, ctr: Path, reference: str) -> str:
        """As `pull` by containerd 2.x: its own client asks the registries (`--local`)."""
        hosts = ["--hosts-dir", str(self.hosts), "--platform", "linux/amd64"]
        words = ["-n", "tests", "images", "pull", "--local", *hosts, reference]
        run(ctr, "-a", self.folder / "sock", *words, limit=120)
        return self.images()[reference]

    def ctr(self, *words: str) -> bytes:
        return run(self._ctr, "-a", self.folder / "sock", "-n", "tests", *words).stdout

    def pull(self, reference: str, *, all_platforms: bool = False) -> str:
        """The digest that containerd holds for the reference afterwards."""
        platforms = ["--all-platforms"] if all_platforms else ["--platform", "linux/amd64"]
        self.ctr("images", "pull", "--hosts-dir", str(self.hosts), *platforms, reference)
        return self.images()[reference]

    def images(self) -> dict[str, str]:
        lines = self.ctr("images", "list").decode().splitlines()[1:]
        return {line.split()[0]: line.split()[2] for line in lines}

    def content(self, digest: str) -> bytes:
        return self.ctr("content", "get", digest)

    def holds(self, image: Image) -> bool:
        """Every manifest and blob of it, byte for byte."""
        return all(self.content(each.digest) == each.data for each in image.all_content())

    def wipe(self) -> None:
        """Forget all images and their content, as if the node were new."""
        for reference in self.images():
            self.ctr("images", "remove", "--sync", reference)
        for digest in self.ctr("content", "list", "--quiet").decode().split():
            self.ctr("content", "remove", digest)
        assert self.ctr("content", "list", "--quiet") == b""

    def run(self, reference: str, *command: str) -> bytes:
        """What a container of this image prints, without a network and a terminal."""
        require_tool("runc")
        return self.ctr("run", "--rm", reference, "test", *command)

    def config_of(self, image: Image) -> object:
        return json.loads(self.content(image.blobs[0].digest))
