"""What the server tells the process that supervises it: systemd's sd_notify protocol.

One datagram a state, to the socket that `NOTIFY_SOCKET` names. Without that variable nothing is
sent. A state that cannot be sent changes nothing: the server serves all the same.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from ociproxy import log

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_SEND_TIME: Final = 1.0
"""Seconds that handing a state over may take: systemd may be busy, and its socket's queue full."""
_LEAST_INTERVAL: Final = 0.1
"""Seconds between two signs of life, at least, whatever the variable says."""


class Supervisor:
    """Belongs to the process that made it and to the workers that this process forks.

    `interval` is the seconds between two calls of `alive`, None where no watchdog waits for them.
    `ready` and `reloading` may block for a second, the others do not.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        """Takes the variables away, so that no child process (skopeo, a credential helper) speaks
        in the name of the server."""
        variables = os.environ if environment is None else environment
        self._main = os.getpid()
        self._address = _address(variables.pop("NOTIFY_SOCKET", ""))
        self.interval = _interval(
            variables.pop("WATCHDOG_USEC", ""), variables.pop("WATCHDOG_PID", "")
        )
        if not self._address:
            self.interval = None

    def ready(self) -> None:
        """The port is served; or a reload is over, whether it changed anything or not."""
        self._send("READY=1")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """From a worker nothing is sent: its end is not that of the service."""
        if os.getpid() == self._main:
            self._send("STOPPING=1", limit=0)

    def alive(self) -> None:
        """The main process is at work, and not stuck. A worker speaks for itself alone, which the
        supervisor could not tell: from a worker nothing is sent."""
        if self.interval is not None and os.getpid() == self._main:
            self._send("WATCHDOG=1", limit=0)

    def _send(self, state: str, limit: float = _SEND_TIME) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(limit)
                sender.connect(self._address)
                sender.sendall(state.encode())
        except OSError as exc:
            what = state.partition("=")[0].lower()
            log.event(logging.WARNING, "supervisor not told", state=what, reason=exc)


def _address(name: str) -> str:
    """The socket's address: a path, or a name in Linux's abstract namespace, which starts with @
    in the variable and with a zero byte for the kernel. Any other form is none of ours."""
    if name.startswith("@"):
        return f"\0{name[1:]}"
    return name if name.startswith("/") else ""


def _interval(microseconds: str, pid: str) -> float | None:
    """Half the time after which systemd takes a silent process for stuck."""
    if not microseconds.isdecimal() or (pid and pid != str(os.getpid())):
        return None
    return max(_LEAST_INTERVAL, int(microseconds) / 2_000_000)
