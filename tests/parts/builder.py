"""buildah and podman over one storage of their own: what one builds the other runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Self

from tests.parts.clients import ACCEPT_ANYTHING
from tests.parts.tools import require_root, require_tool, run

STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/root"
runroot = "{folder}/run"
"""
# The limits podman sets by itself may be above what this machine lets even root have.
CONTAINERS = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
events_logger = "none"
cgroup_manager = "cgroupfs"
"""


class Builder:
    def __init__(self) -> None:
        require_root()
        self._buildah, self._podman = require_tool("buildah"), require_tool("podman")
        require_tool("runc")
        # overlayfs does not stand on itself, and pytest's folder may be in a container's.
        self.folder = Path(tempfile.mkdtemp(prefix="builder-", dir="/tmp"))
        self._env = {"BUILDAH_ISOLATION": "chroot"}
        for variable, name, text in (
            ("CONTAINERS_STORAGE_CONF", "storage.conf", STORAGE.format(folder=self.folder)),
            ("CONTAINERS_CONF", "containers.conf", CONTAINERS),
            ("CONTAINERS_REGISTRIES_CONF", "registries.conf", ""),
            ("", "policy.json", ACCEPT_ANYTHING),
        ):
            (self.folder / name).write_text(text, encoding="utf-8")
            if variable:
                self._env[variable] = str(self.folder / name)
        self._trust = f"--signature-policy={self.folder / 'policy.json'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        run(self._podman, "rm", "--all", "--force", env=self._env, check=False)
        run(self._buildah, "rm", "--all", env=self._env, check=False)
        run("umount", "-l", self.folder / "root/overlay", env=self._env, check=False)
        shutil.rmtree(self.folder)

    def build(self, context: Path, dockerfile: Path, tag: str, **arguments: str) -> None:
        """In Docker's format, which has health checks. Registries may speak plain HTTP."""
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        options = ["--format=docker", "--tls-verify=false", self._trust, "--quiet", *given]
        command = [self._buildah, "bud", *options, f"--file={dockerfile}", f"--tag={tag}"]
        run(*command, context, env=self._env, limit=300)

    def start(self, image: str, name: str, *options: str, arguments: tuple[str, ...] = ()) -> None:
        """In the background, with this machine's network."""
        isolation = ["--detach", "--network=host", "--runtime=runc"]
        self.podman("run", *isolation, f"--name={name}", *options, image, *arguments)

    def podman(self, *words: str, check: bool = True) -> str:
        """What it prints."""
        return run(self._podman, *words, env=self._env, check=check).stdout.decode().strip()

    def logs(self, name: str) -> str:
        done = run(self._podman, "logs", name, env=self._env)
        return (done.stdout + done.stderr).decode(errors="replace")
