"""A systemd of its own, as process 1 of namespaces, over this machine's files.

It sees the root file system through an overlay, which is thrown away, and only the units that it is
given. The network is this machine's. The product lies in /opt/ociproxy, as an operator installs it.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Self

import pytest

from tests.parts.tools import require_root, require_tool, run
from tests.server import PROGRAM, ROOT

UNITS = "/etc/systemd/system"
_BOOT = r"""
set -e
folder=$1 console=$2 checkout=$3 packages=$4
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
mount -t overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" overlay "$folder/root"
cd "$folder/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
touch dev/console
mount --bind "$console" dev/console
ln -s /proc/self/fd dev/fd
mkdir dev/pts dev/shm
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
# Nothing of this machine is started: no unit wants another one.
rm -rf usr/lib/systemd/system/*.target.wants etc/systemd/system etc/default/ociproxy opt/ociproxy
rm -rf var/lib/ociproxy var/lib/private/ociproxy
mkdir -p etc/systemd/system opt/ociproxy opt/checkout opt/packages
mount --bind -o ro "$checkout" opt/checkout
mount --bind -o ro "$packages" opt/packages
printf '[Unit]\nAllowIsolate=yes\nWants=systemd-journald.socket\n' >etc/systemd/system/tests.target
mkdir run/old
pivot_root . run/old
umount -l /run/old
# As a container's manager has to: a unit's credentials are mounted by another process.
mount --make-rshared /
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=tests.target --log-target=console --show-status=0
"""
_STARTED = "Startup finished"
_START_LIMIT = 60.0


class Systemd:
    """`run` runs a command in it as root; `write` puts a file there."""

    def __init__(self) -> None:
        require_root()
        self._nsenter = require_tool("nsenter")
        require_tool("unshare")
        require_tool("setpriv")
        require_tool("systemctl")
        _require_python()
        self._group = _control_groups() / f"tests-{uuid.uuid4().hex}"
        self._folder = Path(tempfile.mkdtemp(prefix="systemd-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._console = bytearray()
        self._pid = 0

    def __enter__(self) -> Self:
        try:
            self._start()
            self._install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self._group.mkdir()
        leader, console = pty.openpty()
        # The group that this shell is in becomes the root of the new namespace. What is killed
        # takes all that it began with it, and so does the end of these tests.
        enter = f"echo $$ >{self._group}/cgroup.procs || exit"
        script = f'{enter}; exec setpriv --pdeathsig KILL unshare "$@"'
        apart = ("--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child")
        packages = sysconfig.get_paths()["purelib"]
        boot = ("sh", "-c", _BOOT, "boot", self._folder, os.ttyname(console), ROOT, packages)
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", *apart, *map(str, boot)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(leader,), daemon=True).start()
        end = time.monotonic() + _START_LIMIT
        while _STARTED not in self.console:
            if self._process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"systemd does not start:\n{self.console}")
            time.sleep(0.02)
        os.close(console)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._pid = int(children.read_text().split()[0])

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # Its child, the process 1 of the namespace, ends with it, and all others with that.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        end = time.monotonic() + 10
        while self._group.exists() and time.monotonic() < end:
            for folder, _dirs, _files in os.walk(self._group, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
        shutil.rmtree(self._folder)

    def _read(self, leader: int) -> None:
        with contextlib.suppress(OSError):
            while read := os.read(leader, 65536):
                self._console += read
        os.close(leader)

    @property
    def console(self) -> str:
        return self._console.decode(errors="replace")

    def _install(self) -> None:
        """What `pip install` puts there, without its time. The service sees neither /home nor
        /root nor this machine's /tmp, and one of them may hold the checkout."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        python = Path(sys.base_prefix) / "bin" / version  # not that of the checkout's environment
        self.run(python, "-m", "venv", "--without-pip", "/opt/ociproxy")
        paths = f"/opt/ociproxy/lib/{version}/site-packages/checkout.pth"
        self.write(paths, "/opt/checkout\n/opt/packages\n")
        _first, _, script = PROGRAM.read_text(encoding="utf-8").partition("\n")
        self.write("/opt/ociproxy/bin/ociproxy", f"#!/opt/ociproxy/bin/python3\n{script}")
        self.run("chmod", "755", "/opt/ociproxy/bin/ociproxy")

    def run(
        self, *command: str | Path, check: bool = True, limit: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        enter = (f"--target={self._pid}", "--mount", "--pid", "--ipc", "--uts", "--cgroup")
        return run(self._nsenter, *enter, "--", *command, check=check, limit=limit, cwd=Path("/"))

    def write(self, path: str, text: str) -> None:
        script = 'mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1"'
        self.run("sh", "-c", script, "write", path, text)

    def show(self, unit: str, *names: str) -> list[str]:
        """The unit's properties of these names, in their order."""
        told = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names))
        values = dict(line.split("=", 1) for line in told.stdout.decode().splitlines())
        return [values[name] for name in names]

    def journal(self, unit: str, *options: str) -> str:
        self.run("journalctl", "--sync")
        told = self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}", *options)
        return told.stdout.decode(errors="replace")


def _require_python() -> None:
    """A unit that protects homes has to reach the interpreter all the same."""
    if Path(sys.base_prefix).parts[1:2] in {("root",), ("home",), ("tmp",)}:
        pytest.skip(f"needs a Python outside of homes: this one is in {sys.base_prefix}")


def _control_groups() -> Path:
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _device, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    reason = "needs a writable hierarchy of control groups (cgroup2)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
