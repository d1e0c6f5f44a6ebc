"""A drawn network for a server under test: what names resolve to, and where addresses lead.

Python imports this at its start where the folder is on PYTHONPATH. It stands for the resolver and
the routers, which no test can have for real, and for nothing of ours. `DRAWN_NETWORK` names a JSON
file: `names` gives for each name the answers it resolves to in turn (the last one stays), `routes`
gives for an address where a connection to it really goes. Every address connected to is appended to
`log`.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

_drawn: dict[str, Any] = json.loads(Path(os.environ["DRAWN_NETWORK"]).read_text(encoding="utf-8"))
_names: dict[str, list[list[str]]] = _drawn["names"]
_routes: dict[str, str] = _drawn["routes"]
_really_getaddrinfo = socket.getaddrinfo
_really_connect = socket.socket.connect


def _getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
    answers = _names.get(host) if isinstance(host, str) else None
    if answers is None:
        return _really_getaddrinfo(host, port, *args, **kwargs)
    addresses = answers.pop(0) if len(answers) > 1 else answers[0]
    return [
        entry
        for address in addresses
        for entry in _really_getaddrinfo(address, port, *args, **kwargs)
    ]


def _connect(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        with Path(_drawn["log"]).open("a", encoding="utf-8") as log:
            log.write(f"{address[0]}\n")
        address = (_routes.get(address[0], address[0]), *address[1:])
    _really_connect(self, address)


socket.getaddrinfo = _getaddrinfo
socket.socket.connect = _connect  # type: ignore[assignment, method-assign]
