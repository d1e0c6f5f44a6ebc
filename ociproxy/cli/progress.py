"""How far long work has come: bars on a terminal, a line a thing in a pipe.

Always on standard error, so that standard output is a program's to read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_INTERVAL: Final = 0.125
"""Seconds between two looks at what is going on."""
_MOST_BARS: Final = 16
_NAME_WIDTH: Final = 48


@dataclass(frozen=True, slots=True)
class Step:
    """One thing in work; `key` tells it from others, sizes are bytes, and a size that is not
    known yet is None."""

    key: object
    name: str
    done: int
    size: int | None


class Screen:
    """Where a command says what happens: lines that stay, above bars that move."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    @property
    def has_bars(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def line(self, text: str) -> None:
        """One line, whatever stands in it: an upstream's or an archive's words may hold what a
        terminal obeys."""
        self._console.print("".join(map(_shown, text)))

    @asynccontextmanager
    async def watching(
        self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> AsyncIterator[None]:
        """Show bars while the block runs, if this is a terminal: one for everything, with rate and
        time left, and one for each step."""
        if not self.has_bars:
            yield
            return
        bars = _Bars(self._console)
        with bars.progress:
            moving = asyncio.create_task(bars.move(overall, steps))
            try:
                yield
            finally:
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                bars.clear()

    @contextmanager
    def watching_work(self, overall: Callable[[], Step]) -> Iterator[None]:
        """The same for work that blocks: one bar, moved by a thread of its own."""
        if not self.has_bars:
            yield
            return
        bars, ended = _Bars(self._console), threading.Event()
        with bars.progress:
            moving = threading.Thread(target=bars.move_until, args=(ended, overall), daemon=True)
            moving.start()
            try:
                yield
            finally:
                ended.set()
                moving.join()
                bars.clear()


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "?"


class _Bars:
    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._overall = self.progress.add_task("", total=None)
        self._shown: dict[object, TaskID] = {}
        self._most = max(1, min(_MOST_BARS, console.height - 4))

    async def move(self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]) -> None:
        while True:
            self._show(overall(), list(steps())[: self._most])
            await asyncio.sleep(_INTERVAL)

    def move_until(self, ended: threading.Event, overall: Callable[[], Step]) -> None:
        while not ended.wait(_INTERVAL):
            self._show(overall(), [])

    def clear(self) -> None:
        for task in self.progress.task_ids:
            self.progress.remove_task(task)

    def _show(self, overall: Step, steps: list[Step]) -> None:
        self._update(self._overall, overall)
        keys = {step.key for step in steps}
        for key in [key for key in self._shown if key not in keys]:
            self.progress.remove_task(self._shown.pop(key))
        for step in steps:
            task = self._shown.get(step.key)
            if task is None:
                task = self._shown[step.key] = self.progress.add_task("", total=None)
            self._update(task, step)
        self.progress.refresh()

    def _update(self, task: TaskID, step: Step) -> None:
        name = step.name
        if len(name) > _NAME_WIDTH:
            name = f"...{name[3 - _NAME_WIDTH :]}"
        self.progress.update(task, description=name, completed=step.done, total=step.size)
