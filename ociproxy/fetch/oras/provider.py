"""`oras.provider.Registry`, and the libraries below it, imported without what is not used here.

Each command that asks an upstream would wait for these at its start:

- jsonschema, 60 ms, over a second where another program has installed its extra formats: oras
  validates what it pushes, and nothing here pushes;
- chardet, or charset_normalizer, 10 to 30 ms: requests guesses with it how a text is encoded whose
  header does not say so, and no such text is read here;
- importlib.metadata, 7 ms: urllib3 asks with it for the version of a library for HTTP/2.

Tests: tests/fetch/oras/test_library_hooks.py, tests/test_architecture.py.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_GUESSERS: Final = ("chardet", "charset_normalizer")


class _Deferred(ModuleType):
    """Stands for a module, and imports it when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # which an import of a name of it asks for
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Metadata(_Deferred):
    def version(self, name: str) -> Any:
        """A function, which is imported by its name: the module is imported when it is called."""
        return self.__getattr__("version")(name)


@contextmanager
def _in_place_of(**modules: ModuleType | None) -> Iterator[None]:
    """Inside, an import gets these; None stands for a module that is not installed. What is
    imported already is left as it is."""
    new = {name: each for name, each in modules.items() if name not in sys.modules}
    sys.modules.update(new)  # type: ignore[arg-type] # None is allowed there
    try:
        yield
    finally:
        for name, each in new.items():
            # The program's other modules get the module itself.
            if name in sys.modules and sys.modules[name] is each:
                del sys.modules[name]


with (
    _in_place_of(
        **dict.fromkeys(_GUESSERS), **{"importlib.metadata": _Metadata("importlib.metadata")}
    ),
    warnings.catch_warnings(),
):
    warnings.filterwarnings("ignore", "Unable to find acceptable character detection")
    import requests  # noqa: F401
with _in_place_of(jsonschema=_Deferred("jsonschema")):
    from oras.provider import Registry

__all__ = ["Registry"]
