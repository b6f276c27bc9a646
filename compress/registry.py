"""Registries: methods, export formats and base formats by name, each imported when it is first looked up.

A member is a class whose header says its name, `class GPTQ(Quantiser, name="gptq")`. It is found in a file of the
registry's folder, in another distribution that names it under an entry point of the registry's group, or nowhere but
in a running program that defines it. The names are known without importing a member: torch stays out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from calibration import entry_points as outside
from compress.errors import PluginError

T = TypeVar("T")

_NAME = re.compile(r"(?!(none|auto)$)[A-Za-z0-9][\w.-]*")
"""Names stand in options, where `none` and `auto` mean something else, and in the names of folders."""


class Registry(Mapping[str, type[T]]):
    """Name -> class. Iterating, `len` and `in` import nothing; looking a name up imports the module that defines it.

    Raises PluginError where two members have one name, naming both, and where a member cannot be loaded.
    """

    def __init__(
        self,
        package: str,
        kind: str,
        classes: dict[str, type[T]] | None = None,
        fault: Callable[[type], str] = lambda _: "",
    ) -> None:
        """`package`: dotted name of the folder, and the group of entry points; `kind` is for messages: "method".

        `classes`: where members put themselves that may not import this module; None: they call `register`.
        `fault` says what a class lacks to be a member, what follows its name; empty for nothing. It is asked when the
        class is looked up, for decorators are applied after it has registered itself.
        """
        self.package, self.kind, self.fault = package, kind, fault
        self._classes: dict[str, type[T]] = {} if classes is None else classes

    def register(self, name: str, member: type[T]) -> None:
        """Add a class; one defined again in its place (a notebook's cell, say) takes the place of the first.

        Raises PluginError for a name that options cannot have, and if another class has it.
        """
        if not _NAME.fullmatch(name):
            raise PluginError(
                f"{_home(member)}: {name!r} cannot be the name of one of the {self.kind}s; take letters, digits, '-', "
                "'_' and '.', and neither none nor auto"
            )
        known = self._classes.get(name)
        if known is not None and _home(known) != _home(member):
            raise self._clash(name, _home(known), _home(member))
        inside = member.__module__.startswith(f"{self.package}.")
        if not inside and name in members_of(self.package):
            raise self._clash(name, members_of(self.package)[name], _home(member))
        self._classes[name] = member

    def forget(self, name: str) -> None:
        """Drop a class that a running program registered."""
        del self._classes[name]

    def __getitem__(self, name: str) -> type[T]:
        """The class of this name. Raises KeyError if there is none."""
        if name not in self._classes:
            source = self._sources()[name]
            if isinstance(source, EntryPoint):
                outside.load(source)
            else:
                import_module(source)
            if name not in self._classes:
                raise PluginError(
                    f"{_told(source)} defines no {self.kind} of the name {name!r}: the class's header must say "
                    f'name="{name}"'
                )
        found = self._classes[name]
        if fault := self.fault(found):
            raise PluginError(f"{self.kind} {name!r} ({_home(found)}) {fault}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._sources(), *self._classes}))

    def __len__(self) -> int:
        return len({*self._sources(), *self._classes})

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._sources()

    def modules_of_the_program(self) -> frozenset[str]:
        """Modules whose members only this running program knows: another process must import them to find these."""
        found = self._sources()
        return frozenset(
            member.__module__ for name, member in self._classes.items() if name not in found
        )

    def _sources(self) -> Mapping[str, str | EntryPoint]:
        """The module or entry point of every member that is not only in a running program."""
        found: dict[str, str | EntryPoint] = dict(members_of(self.package))
        for point in outside.points(self.package):
            if point.name in found:
                raise self._clash(point.name, _told(found[point.name]), _told(point))
            found[point.name] = point
        return found

    def _clash(self, name: str, first: str, second: str) -> PluginError:
        return PluginError(
            f"two {self.kind}s have the name {name!r}: {first} and {second}; rename or uninstall one"
        )


@cache
def members_of(package: str) -> Mapping[str, str]:
    """Name -> module of the classes with `name="..."` in their header, as the source files of a package tell.

    Raises PluginError if two have one name.
    """
    spec = find_spec(package)
    found: dict[str, str] = {}
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            for name in _named_classes(path.read_text(encoding="utf-8")):
                if name in found:
                    raise PluginError(
                        f"{found[name]} and {module} both define {name!r}; rename one"
                    )
                found[name] = module
    return found


def _named_classes(source: str) -> Iterator[str]:
    if "name=" not in source:
        return
    for node in ast.parse(source).body:
        for keyword in node.keywords if isinstance(node, ast.ClassDef) else ():
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                yield str(keyword.value.value)


def unwritten(kind: type, abstract: frozenset[str]) -> list[str]:
    """The members that a class must write itself, and has left abstract, by name."""
    return [
        member
        for member in sorted(abstract)
        if getattr(getattr(kind, member), "__isabstractmethod__", False)
    ]


def _home(member: type) -> str:
    return f"{member.__module__}.{member.__qualname__}"


def _told(source: str | EntryPoint) -> str:
    """Where a member comes from, for messages."""
    return source if isinstance(source, str) else outside.told(source)
