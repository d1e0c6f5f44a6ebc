"""Options that commands share, and the configuration that they make: an option wins over its
environment variable, that over the file, and that over the default.

Tests: tests/cli/test_list_command.py, tests/load/test_loader.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ociproxy.cli.terminal import AS_JSON
from ociproxy.config.settings import Config
from ociproxy.config.units import parse_duration, parse_size
from ociproxy.errors import NameInvalid
from ociproxy.log import LEVELS
from ociproxy.oci.platform import Platform
from ociproxy.store.store import Store, is_store, open_existing, temporary_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack


class PlatformType(click.ParamType[Platform]):
    name = "platform"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Platform:
        if isinstance(value, Platform):
            return value
        try:
            return Platform.parse(str(value))
        except NameInvalid as exc:
            several = "; repeat the option for each" if "," in str(value) else ""
            self.fail(f"{exc}{several}", param, ctx)


class PathType(click.Path):
    """A path. An empty one is refused: a shell variable that is not set does not mean `.`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


class SizeType(click.ParamType[int]):
    """Bytes, written as in the configuration file: 700M, 4GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        size = parse_size(value)
        if not size:
            self.fail(f"{value!r} is not a size such as 700M, 4.7G or 4GiB", param, ctx)
        return size


class DurationType(click.ParamType[float]):
    """Seconds, written as in the configuration file: 90s, 12h, 30d."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = parse_duration(value)
        if seconds is None:
            self.fail(f"{value!r} is not a duration such as 90s, 12h or 30d", param, ctx)
        return seconds


image_path = click.option(
    "--image-path",
    envvar="OCIPROXY_IMAGE_PATH",
    type=PathType(),
    help="Where the store is.  [default: store.path, else /var/lib/ociproxy]",
)
config_path = click.option(
    "--config-path",
    envvar="OCIPROXY_CONFIG_PATH",
    type=PathType(),
    help="The YAML configuration file.",
)
log_level = click.option(
    "--log-level",
    envvar="OCIPROXY_LOG_LEVEL",
    type=click.Choice(list(LEVELS)),
    help="What to log.  [default: log.level, else info]",
)
quiet_log_level = click.option(
    "--log-level",
    envvar="OCIPROXY_LOG_LEVEL",
    type=click.Choice(list(LEVELS)),
    default="error",
    show_default=True,
    help="What to log beside what the command says anyway.",
)
log_format = click.option(
    "--log-format",
    envvar="OCIPROXY_LOG_FORMAT",
    type=click.Choice(["text", "json"]),
    help="How to log it.  [default: log.format, else text]",
)
pull_timeout = click.option(
    "--pull-timeout",
    metavar="MS",
    envvar="OCIPROXY_PULL_TIMEOUT",
    type=click.IntRange(50, 86_400_000),
    callback=lambda _ctx, _param, value: None if value is None else value / 1000,
    help="How long an image that is loaded may go without progress.  "
    "[default: load.pull_timeout, else 60000]",
)

pin_option = click.option(
    "--pin",
    is_flag=True,
    envvar="OCIPROXY_PIN",
    help="Pin each image: no prune removes it before `pins remove`.",
)


def kubernetes_option(meaning: str) -> Callable[..., Any]:
    """Files of Kubernetes manifests, as `manifests`."""
    return click.option(
        "--kubernetes",
        "manifests",
        metavar="FILE",
        multiple=True,
        envvar="OCIPROXY_KUBERNETES",
        help=meaning,
    )


def platform_option(meaning: str) -> Callable[..., Any]:
    """Platforms, as `platforms`."""
    return click.option(
        "--platform",
        "platforms",
        type=PlatformType(),
        metavar="OS/ARCH[/VARIANT][:VERSION]",
        multiple=True,
        envvar="OCIPROXY_PLATFORM",
        help=meaning,
    )


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[AS_JSON] = value
    return value


json_events = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_remember,
    envvar="OCIPROXY_JSON",
    help="Print an event a line, as JSON, and the outcome as the last.",
)


verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    envvar="OCIPROXY_VERBOSE",
    help="Print whole digests; --json always does.",
)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that runs for long."""
    for option in (log_format, log_level, config_path, image_path):
        command = option(command)
    return command


def configuration(
    config_path: Path | None,
    *,
    image_path: Path | None = None,
    log_level: str | None = None,
    log_format: str | None = None,
    serve: dict[str, object] | None = None,
    admin: dict[str, object] | None = None,
    load: dict[str, object] | None = None,
) -> Config:
    """The file's configuration, with each option that was given in place of the file's value.

    An option that was not given is None. Raises ConfigError.
    """
    config = Config() if config_path is None else _read(config_path)
    return replace(
        config,
        store=_with(config.store, path=image_path),
        log=_with(config.log, level=log_level, format=log_format),
        serve=_with(
            config.serve, **(serve or {}), admin=_with(config.serve.admin, **(admin or {}))
        ),
        load=_with(config.load, **(load or {})),
    )


def existing_store(config_path: Path | None, image_path: Path | None) -> Store:
    """The store, for a command that only reads it. Raises ConfigError, StoreError."""
    return open_existing(configuration(config_path, image_path=image_path).store.path)


def served_store(config: Config, stack: ExitStack) -> Store:
    """The store with the bundles that a server would have, for a command that only reads it; the
    bundles are open until `stack` ends. Raises ConfigError, LayoutInvalid, StoreError."""
    root = config.store.path
    if not config.serve.bundles:
        return open_existing(root)
    # Imported only for a bundle: reading one takes much that a store needs not.
    from ociproxy.archive.bundle import Bundle

    below = [stack.enter_context(Bundle(path)) for path in config.serve.bundles]
    if is_store(root):
        return Store(root, below=below)
    return stack.enter_context(temporary_store(below=below))


def _read(config_path: Path) -> Config:
    # Imported only for a file: YAML, TLS and the table of keys take longer than most commands.
    from ociproxy.config.file import read_config

    return read_config(config_path)


def _with(section: Any, **values: object) -> Any:
    return replace(section, **{k: v for k, v in values.items() if v is not None})
