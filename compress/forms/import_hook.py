"""A call that waits for another package's module to be imported, and imports nothing by itself.

What the call needs is then there, and who never imports that module never pays for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, call: Callable[[], None]) -> None:
    """Calls `call` as soon as the module `name` has run, before whoever imports it goes on.

    At once if the module's top package was imported before, which imports the module. Otherwise a finder at the head
    of sys.meta_path waits for the module and leaves when it has run. `call` must bear being called twice.
    """
    finder = _Finder(name, call)
    sys.meta_path.insert(0, finder)
    # Looked up after the finder is in place: an import that another thread begins in between is seen by the finder,
    # one that it began before is waited for.
    if sys.modules.get(name.partition(".")[0]) is not None:
        import_module(name)
        finder.leave()
        call()


class _Finder(MetaPathFinder):
    """Finds one module as the finders behind it do, and has its loader call when the module has run."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the next finder gives, with a loader of ours; None for any other module."""
        if name != self.name or self not in sys.meta_path:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def leave(self) -> None:
        """A new list: taking an entry out of one that another thread walks would make it miss a finder."""
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


class _Loader(Loader):
    """Another loader in everything, but that a call follows the module's run."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        """Source, resources and whatever else loaders can be asked for."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which knows the other loader only, and call."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.leave()
        self._finder.call()
