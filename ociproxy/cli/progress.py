"""Bars on a terminal, drawn with rich below the lines that stay. `Screen` imports this module only
if standard error is a terminal."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from ociproxy.cli.terminal import Step

_INTERVAL: Final = 0.125
"""Seconds between two redraws: eight a second look smooth."""
_MOST_BARS: Final = 16
"""More bars than a person follows; a small terminal shows fewer."""
_NAME_WIDTH: Final = 48
"""Columns of a name, so that the bar and the numbers fit beside it."""


def open_bars() -> Bars | None:
    """Bars on standard error; None if it is no terminal or cannot move the cursor."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else None


class Bars:
    """One bar for everything and one for each step, while a block of work runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._shown: dict[object, TaskID] = {}
        self._most = max(1, min(_MOST_BARS, console.height - 4))

    def line(self, text: str) -> None:
        """Print a line above the bars; it stays."""
        self._console.print(text)

    @asynccontextmanager
    async def moving(
        self, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> AsyncIterator[None]:
        """Redraw from a task of the event loop while the block runs."""
        with self._drawn() as bar:
            task = asyncio.create_task(self._move(bar, overall, steps))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    @contextmanager
    def moving_beside(self, overall: Callable[[], Step]) -> Iterator[None]:
        """Redraw the one bar from a thread, while a block runs that blocks."""
        ended = threading.Event()
        with self._drawn() as bar:
            thread = threading.Thread(target=self._move_until, args=(ended, bar, overall))
            thread.daemon = True
            try:
                thread.start()
                yield
            finally:
                ended.set()
                if thread.ident is not None:
                    thread.join()

    @contextmanager
    def _drawn(self) -> Iterator[TaskID]:
        """The bar for everything; all bars are removed in the end."""
        with self._progress:
            try:
                yield self._progress.add_task("", total=None)
            finally:
                for task in self._progress.task_ids:
                    self._progress.remove_task(task)
                self._shown.clear()

    async def _move(
        self, bar: TaskID, overall: Callable[[], Step], steps: Callable[[], Iterable[Step]]
    ) -> None:
        while True:
            self._show(bar, overall(), list(steps())[: self._most])
            await asyncio.sleep(_INTERVAL)

    def _move_until(self, ended: threading.Event, bar: TaskID, overall: Callable[[], Step]) -> None:
        while not ended.wait(_INTERVAL):
            self._show(bar, overall(), [])

    def _show(self, bar: TaskID, overall: Step, steps: list[Step]) -> None:
        self._update(bar, overall)
        keys = {step.key for step in steps}
        for key in [key for key in self._shown if key not in keys]:
            self._progress.remove_task(self._shown.pop(key))
        for step in steps:
            task = self._shown.get(step.key)
            if task is None:
                task = self._shown[step.key] = self._progress.add_task("", total=None)
            self._update(task, step)
        self._progress.refresh()

    def _update(self, task: TaskID, step: Step) -> None:
        name = step.name
        if len(name) > _NAME_WIDTH:
            name = f"...{name[3 - _NAME_WIDTH :]}"
        self._progress.update(task, description=name, completed=step.done, total=step.size)
