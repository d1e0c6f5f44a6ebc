"""The images that a command line names: in image lists, in Kubernetes manifests, by platform.

Tests: tests/load/test_loader.py, tests/load/test_kubernetes.py.
"""

from __future__ import annotations

import platform as machine
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import click

from ociproxy.config.reading import decode, read_file, read_stream
from ociproxy.errors import ConfigError, DigestInvalid, NameInvalid
from ociproxy.load import imagelist
from ociproxy.load.imagelist import (
    ALL_PLATFORMS,
    ImageListInvalid,
    Wanted,
    merged,
    parse_list,
    parse_reference,
)
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import Reference

STDIN: Final = "-"


def machine_platform() -> tuple[Platform, ...]:
    """Linux on this machine's processor: the default of `load`."""
    return (Platform.parse(f"linux/{machine.machine()}"),)


def chosen_platforms(
    os: str | None, archs: Sequence[str], platforms: Sequence[Platform], *, everything: bool
) -> tuple[Platform, ...] | None:
    """The platforms that the options name, None without any. Raises click.UsageError."""
    if sum((everything, bool(platforms), bool(os or archs))) > 1:
        raise click.UsageError(
            "--all-platforms, --platform and --arch/--os exclude each other: give one of them"
        )
    if everything:
        return ALL_PLATFORMS
    if os or archs:
        names = [f"{os or 'linux'}/{arch}" for arch in archs or (machine.machine(),)]
        try:
            platforms = [Platform.parse(name) for name in names]
        except NameInvalid as error:
            raise click.UsageError(str(error)) from error
    return tuple(dict.fromkeys(platforms)) or None


def read_wanted(
    lists: Sequence[str],
    manifests: Sequence[str],
    platforms: tuple[Platform, ...],
    *,
    note: Callable[[str], None] = lambda _: None,
) -> list[Wanted]:
    """The images of all lists and Kubernetes manifests, each once, before any of them is looked at.

    `note` gets a line for each file without an image, and for each image that a manifest only
    seems to name and that no file wants. Raises ImageListInvalid with every problem.
    """
    if [*lists, *manifests].count(STDIN) > 1:
        raise click.UsageError(f"{STDIN} can be read only once")
    wanted: list[Wanted] = []
    problems: list[ConfigError] = []
    mentions: dict[Reference, str] = {}
    for name in lists:
        try:
            text = _read(name, imagelist.SIZE_LIMIT)
        except ConfigError as error:
            problems.append(_explained(name, error))
            continue
        found, wrong = parse_list(text, _shown(name), platforms=platforms)
        wanted += found
        problems += wrong
        if not (found or wrong):
            note(f"{_shown(name)}: names no image")
    for name in manifests:
        # Imported here: a load from lists needs no YAML.
        from ociproxy.load import kubernetes

        try:
            text = _read(name, kubernetes.SIZE_LIMIT)
        except ConfigError as error:
            problems.append(error)
            continue
        findings = kubernetes.find_images(text, _shown(name))
        for each in findings.images:
            place = f"{_shown(name)}:{each.line} ({each.owner})"
            wanted.append(Wanted(each.reference, platforms, place))
        for each in findings.mentions:
            place = f"{_shown(name)}:{each.line}: {each.owner}"
            mentions.setdefault(each.reference, place)
        problems += findings.problems
        if not (findings.images or findings.problems):
            note(f"{_shown(name)}: no image found in it")
        for passed_over in findings.passed_over:
            note(passed_over)
    if problems:
        raise ImageListInvalid(problems)
    images = merged(wanted)
    for image in images:
        mentions.pop(image.reference, None)
    for reference, place in mentions.items():
        note(f"{place}: {reference} looks like an image, left out")
    return images


def _shown(name: str) -> str:
    return "standard input" if name == STDIN else name


def _read(name: str, limit: int) -> str:
    """The text of a file or of standard input. Raises ConfigError."""
    source = _shown(name)
    if name == STDIN:
        if not sys.stdin:  # Python has none where it is closed
            raise ConfigError("is closed", file=source)
        data = read_stream(sys.stdin.buffer, source, limit)
    else:
        data = read_file(Path(name), limit)
    return decode(data, source, "utf-8-sig")


def _explained(name: str, error: ConfigError) -> ConfigError:
    """The error, with advice if the user gave an image where a list is expected."""
    has_tag = ":" in name.rpartition("/")[2] or "@" in name
    if not has_tag or not isinstance(error.__cause__, FileNotFoundError):
        return error
    try:
        parse_reference(name)
    except (NameInvalid, DigestInvalid):
        return error
    reason = f"{error.reason}; an image is named by a line of a list, which may be `-`"
    return ConfigError(reason, file=error.file, line=error.line)
