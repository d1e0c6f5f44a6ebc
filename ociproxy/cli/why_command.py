"""`ociproxy why REFERENCE`: one screen about one reference, in plain words."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from ociproxy.cli.options import config_path, configuration, image_path, served_store
from ociproxy.cli.server_client import server_auth_option
from ociproxy.cli.terminal import printable
from ociproxy.cli.why_question import ask_server
from ociproxy.load.imagelist import parse_reference
from ociproxy.load.why import explain, pins_of
from ociproxy.load.why_text import document, lines

if TYPE_CHECKING:
    from pathlib import Path


@click.command("why", short_help="Explain what a request for an image would get, and why.")
@click.argument("reference")
@image_path
@config_path
@click.option(
    "--server",
    metavar="URL",
    envvar="OCIPROXY_SERVER",
    help="The admin listener to ask for the last request.  [default: that of serve.admin, if it "
    "answers]",
)
@server_auth_option
@click.option("--json", "as_json", is_flag=True, envvar="OCIPROXY_JSON", help="Print JSON.")
def why(
    reference: str,
    image_path: Path | None,
    config_path: Path | None,
    server: str | None,
    server_auth: Path | None,
    as_json: bool,
) -> None:
    """Explain one image: is it cached and whole, is its tag fresh, which rules apply, what keeps
    it, and what the next request for it would do. Asks no upstream. A running server tells the last
    request for it, and whether the upstream is left alone."""
    config = configuration(config_path, image_path=image_path)
    with ExitStack() as stack:
        store = served_store(config, stack)
        found = explain(store, config, parse_reference(reference), now=time.time())
        pins = pins_of(found, store, config)
    view = ask_server(server, server_auth, config, found.reference)
    if as_json:
        click.echo(json.dumps(document(found, pins, view), indent=1))
        return
    click.echo(found.reference)
    for name, text in lines(found, pins, view):
        click.echo(f"  {name:<10}{printable(text)}")
