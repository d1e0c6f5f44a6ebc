"""Run coroutines together; the first error ends them all.

Tests: tests/load/test_loader.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

T = TypeVar("T")


async def all_of(works: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """The results, in order. The first error cancels the other coroutines, and is raised as it is
    once all of them have ended."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
