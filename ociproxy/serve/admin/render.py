"""The page's documents: templates, style sheet and script, and how values read in them.

Tests: tests/serve/admin/test_page.py.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from ociproxy import __version__
from ociproxy.config.units import show_bytes
from ociproxy.serve.errors import SERVER

if TYPE_CHECKING:
    from jinja2 import Template

VIEWS: Final = {
    "now": "Now",
    "contents": "Contents",
    "store": "Store",
    "log": "Log",
    "why": "Why",
}
_STATIC: Final = {
    "/style.css": "text/css",
    "/live.js": "text/javascript",
    "/icon.svg": "image/svg+xml",
}
_DIGEST: Final = re.compile(r"(:[0-9a-f]{12})[0-9a-f]{20,}")
HEADERS: Final = {
    "Server": SERVER,
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def read_all() -> None:
    """Read all templates and files. Blocks; nothing does afterwards."""
    for name in _environment().list_templates():
        _environment().get_template(name)
    for path in _STATIC:
        _static(path)


def static(path: str) -> web.Response | None:
    """None where the path is no file's."""
    if path not in _STATIC:
        return None
    return web.Response(text=_static(path), headers={**HEADERS, "Content-Type": _STATIC[path]})


def html(view: str, values: dict[str, Any], *, status: int = 200) -> web.Response:
    text = template(view).render(view=view, views=VIEWS, version=__version__, **values)
    headers = {**HEADERS, "Content-Type": "text/html; charset=utf-8"}
    return web.Response(status=status, body=encoded(text), headers=headers)


def encoded(text: str) -> bytes:
    """An image may have any text as its platform, halves of surrogate pairs too."""
    return text.encode("utf-8", "replace")


def template(name: str) -> Template:
    return _environment().get_template(f"{name}.html")


@cache
def _static(path: str) -> str:
    return files("ociproxy.serve.admin").joinpath("static", path[1:]).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ociproxy.serve.admin"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=show_bytes,
        ago=_ago,
        duration=_duration,
        clock=_clock,
        date=_date,
        percent=_percent,
        brief=_brief,
    )
    return environment


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _ago(when: float | str | None) -> str:
    """Of epoch seconds, or a time as `list` writes it."""
    if not when:
        return "—"
    at = datetime.fromisoformat(when).timestamp() if isinstance(when, str) else when
    return f"{_duration(max(0.0, time.time() - at))} ago"


def _clock(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%H:%M:%S")


def _date(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _brief(name: object) -> str:
    """A digest cut short, or a name that has one."""
    return _DIGEST.sub(r"\1", str(name))
