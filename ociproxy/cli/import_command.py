"""`ociproxy import`: its options, and the import from its start to its exit code.

Tests: tests/archive/importer/test_importer.py, tests/real/test_import.py.
"""

from __future__ import annotations

from pathlib import Path

import click

from ociproxy import log
from ociproxy.archive.importer.decompress import MAX_SIZE
from ociproxy.archive.importer.importer import STDIN, Importer, Rules
from ociproxy.archive.importer.naming import GivenName
from ociproxy.archive.importer.results import OnExisting
from ociproxy.cli.capped import capped
from ociproxy.cli.import_report import PinImported, Report
from ociproxy.cli.options import (
    SizeType,
    config_path,
    configuration,
    image_path,
    json_events,
    log_format,
    pin_option,
    quiet_log_level,
    verbose,
)
from ociproxy.cli.screen import Screen
from ociproxy.cli.terminal import INTERRUPTED, Step, sigterm_as_sigint
from ociproxy.config.units import show_size
from ociproxy.errors import ConfigError
from ociproxy.store.store import Store


@click.command("import", short_help="Take images from archives and folders.")
@click.argument(
    "sources", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path)
)
@image_path
@config_path
@quiet_log_level
@log_format
@click.option(
    "--name",
    metavar="REGISTRY/REPOSITORY[:TAG]",
    envvar="OCIPROXY_NAME",
    help="Name for images that have no full name in their source; without a tag they keep theirs.",
)
@click.option(
    "--on-existing",
    type=click.Choice([each.value for each in OnExisting]),
    default=OnExisting.REPLACE.value,
    show_default=True,
    envvar="OCIPROXY_ON_EXISTING",
    help="What to do with a tag that the store has with another digest; error imports nothing.",
)
@click.option(
    "--max-size",
    type=SizeType(),
    default=show_size(MAX_SIZE),
    show_default=True,
    envvar="OCIPROXY_MAX_SIZE",
    help="Refuse an archive that expands to more.",
)
@pin_option
@json_events
@verbose
@click.pass_context
def import_command(
    ctx: click.Context,
    sources: tuple[Path, ...],
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    name: str | None,
    on_existing: str,
    max_size: int,
    pin: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Take images into the store from archives and folders, without a network.

    FILE is an archive of `export` (all its volumes, for one that has volumes), an OCI image layout
    as a folder or a tar, a tar of `docker save`, or the cache folder of an ociregistry; `-` is
    standard input. Tars may be packed with gzip or zstd. Clients see an image only when all of it
    is there. After an interruption run the same import again.
    """
    config = configuration(
        config_path, image_path=image_path, log_level=log_level, log_format=log_format
    )
    log.set_up(config.log.level, config.log.format)
    given = None if name is None else GivenName.parse(name)
    rules = Rules(
        on_existing=OnExisting(on_existing),
        name=given,
        max_size=max_size,
        isolated=config.isolated,
    )
    _check_sources(sources, config.store.path)
    store = Store(config.store.path, hot_manifests=config.store.hot_manifests)
    store.check_writable()
    screen = Screen()
    report = Report(screen, as_json=as_json, verbose=verbose)
    importer = Importer(store, rules, PinImported(store, report) if pin else report)
    interrupted = False
    bar = screen.watching_work(lambda: Step("all", "import", importer.consumed, importer.size))
    try:
        with sigterm_as_sigint(), capped(store, config, config_path), bar:
            importer.run(sources)
    except KeyboardInterrupt:
        interrupted = True
    report.end(interrupted=interrupted)
    ctx.exit(INTERRUPTED if interrupted else report.exit_code)


def _check_sources(sources: tuple[Path, ...], store: Path) -> None:
    """Raises ConfigError where a source is not there, or is the store; called before the store
    makes its folders."""
    for source in sources:
        if source == STDIN:
            continue
        try:
            source.stat()
            same = source.resolve() == store.resolve()
        except OSError as exc:
            raise ConfigError((exc.strerror or str(exc)).lower(), file=str(source)) from exc
        if same:
            raise ConfigError(
                "is the store itself: say another folder with --image-path", file=str(source)
            )
