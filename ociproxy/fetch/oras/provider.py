"""`oras.provider.Registry`, imported without jsonschema.

oras validates what it pushes against a JSON schema, and nothing here pushes. Importing jsonschema
takes 60 ms, which each command that asks an upstream would wait for at its start; over a second
where another program has installed its extra formats.

Tests: tests/fetch/oras/test_library_hooks.py, tests/test_architecture.py.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

_NAME: Final = "jsonschema"


class _Deferred(ModuleType):
    """Stands for a module, and imports it when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


if _NAME not in sys.modules:
    sys.modules[_NAME] = _Deferred(_NAME)
from oras.provider import Registry  # noqa: E402 after what it would import

if isinstance(sys.modules.get(_NAME), _Deferred):
    del sys.modules[_NAME]  # the program's other modules get jsonschema itself

__all__ = ["Registry"]
