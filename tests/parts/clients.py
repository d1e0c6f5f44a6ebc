"""skopeo and podman as clients, with nothing of this host's own settings or storage."""

from __future__ import annotations

import json
from pathlib import Path

from tests.parts.tools import require_tool, run

ACCEPT_ANYTHING = '{"default": [{"type": "insecureAcceptAnything"}]}'


class Skopeo:
    def __init__(self, folder: Path) -> None:
        self._program = require_tool("skopeo")
        folder.mkdir(parents=True, exist_ok=True)
        self._policy, self._registries = folder / "policy.json", folder / "registries.conf"
        self._policy.write_text(ACCEPT_ANYTHING, encoding="utf-8")
        self._registries.write_text("", encoding="utf-8")

    def _run(self, *words: str) -> bytes:
        settings = ["--policy", str(self._policy), "--registries-conf", str(self._registries)]
        return run(self._program, *settings, *words).stdout

    def raw_manifest(self, reference: str, *options: str) -> bytes:
        """The exact bytes that a registry answers for `host:port/name:tag`.

        `options` say how it is reached, where that is not plain HTTP.
        """
        how = options or ("--tls-verify=false",)
        return self._run("inspect", "--raw", *how, f"docker://{reference}")

    def copy(self, reference: str, target: Path, *, everything: bool = False) -> None:
        """Into a folder of plain files, every digest kept; `everything` is all platforms."""
        which = ["--all"] if everything else ["--override-os=linux", "--override-arch=amd64"]
        options = ["copy", "--preserve-digests", "--src-tls-verify=false"]
        # `which` splits: --all belongs to copy, the platform to skopeo.
        before, after = ([], which) if everything else (which, [])
        self._run(*before, *options, *after, f"docker://{reference}", f"dir:{target}")

    def copy_to(self, source: str, target: str, *, everything: bool = False) -> None:
        """From any transport into any other, digests kept where the target can."""
        which = ["--all"] if everything else []
        platform = [] if everything else ["--override-os=linux", "--override-arch=amd64"]
        self._run(*platform, "copy", *which, "--src-tls-verify=false", source, target)

    def list_tags(self, repository: str) -> list[str]:
        answer = self._run("list-tags", "--tls-verify=false", f"docker://{repository}")
        tags: list[str] = json.loads(answer)["Tags"]
        return tags


class Podman:
    def __init__(self, folder: Path) -> None:
        program = require_tool("podman")
        folder.mkdir(parents=True, exist_ok=True)
        self._policy = folder / "policy.json"
        self._policy.write_text(ACCEPT_ANYTHING, encoding="utf-8")
        registries, storage = folder / "registries.conf", folder / "storage.conf"
        registries.write_text("", encoding="utf-8")
        roots = f'graphroot = "{folder / "root"}"\nrunroot = "{folder / "run"}"\n'
        storage.write_text(f'[storage]\ndriver = "vfs"\n{roots}', encoding="utf-8")
        containers = folder / "containers.conf"
        containers.write_text("[engine]\nevents_logger = 'none'\n", encoding="utf-8")
        self._env = {
            "CONTAINERS_REGISTRIES_CONF": str(registries),
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(containers),
        }
        self._command = [
            program,
            f"--tmpdir={folder / 'tmp'}",
            "--cgroup-manager=cgroupfs",
        ]

    def _run(self, *words: str) -> str:
        return run(*self._command, *words, env=self._env).stdout.decode()

    def pull(self, reference: str) -> str:
        """The digest podman has noted for what the reference named."""
        trust = ["--tls-verify=false", f"--signature-policy={self._policy}"]
        self._run("pull", "--quiet", "--platform=linux/amd64", *trust, reference)
        return self.digest(reference)

    def load(self, archive: Path) -> None:
        self._run("load", "--quiet", f"--signature-policy={self._policy}", "--input", str(archive))

    def digest(self, reference: str) -> str:
        """What podman has noted for an image that it has."""
        return self._run("image", "inspect", "--format={{.Digest}}", reference).strip()

    def save(self, reference: str, path: Path, form: str) -> None:
        self._run("save", "--quiet", f"--format={form}", f"--output={path}", reference)

    def files(self, reference: str) -> list[str]:
        """The paths in the image's file system."""
        mounted = Path(self._run("image", "mount", reference).strip())
        try:
            return sorted(str(p.relative_to(mounted)) for p in mounted.rglob("*") if p.is_file())
        finally:
            self._run("image", "unmount", reference)

    def remove(self, reference: str) -> None:
        self._run("image", "rm", "--force", reference)
