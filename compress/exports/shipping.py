"""The code that a native checkpoint brings along, so that it loads where the toolkit is not installed.

That is the module that transformers calls (`forms/loading.py`), the files of the forms that the checkpoint holds, what
these import (of the calibration, what takes stacked experts apart), and a generated `registered.py` that imports the
forms. transformers copies the files that it finds by following relative imports from the first, so every import of our
own becomes relative here. A form from outside is shipped under its module's dotted name, the dots underscores.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compress.errors import CheckpointError
from compress.forms import base, loading
from compress.forms.base import REGISTERED, Form, place_of

PACKAGE = loading.__name__.rpartition(".")[0]
ENTRY = loading.__name__
GENERATED = "registered.py"
ALLOWED = frozenset({"torch", *sys.stdlib_module_names})
BESIDE = frozenset({"calibration.experts.module", "calibration.experts.routing"})
"""Modules of ours that forms need, and that are shipped too."""
LIBRARIES = {ENTRY: frozenset({"transformers"})}
"""Further libraries that some of our own modules import."""


@dataclass(frozen=True)
class _Import:
    """One import statement of a file."""

    line: int
    module: str
    """Absolute; of `from .base import Form` in our package, "compress.forms.base"."""
    shippable: bool
    """Whether it stands at the start of its line as `from MODULE import ...`."""


def shipped(forms: Collection[type[Form]]) -> Mapping[str, str]:
    """Name -> text of the files that a checkpoint needs that holds these forms.

    Raises CheckpointError for a form that could not be read again: one that is not registered, that no file defines, or
    whose file imports what a checkpoint cannot bring along.
    """
    for form in forms:
        _refuse_unregistered(form)
    files = {GENERATED: _registered(forms)}
    waiting = [ENTRY, base.__name__, *sorted(form.__module__ for form in forms)]
    while waiting:
        module = waiting.pop()
        name = file_name(module)
        if name in files:
            continue
        text, imported = _shippable(module)
        files[name] = text
        waiting += imported
    return files


def file_name(module: str) -> str:
    """The name under which a module is shipped."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_") + ".py"


def _refuse_unregistered(form: type[Form]) -> None:
    known = REGISTERED.get(form.__dict__.get("kind", ""))
    if known is None or place_of(known) != place_of(form):
        raise CheckpointError(
            f"native export: {place_of(form)} is not registered, so that nothing could read it again; define it as "
            f"`class {form.__name__}(Form, name=...)`"
        )
    if "." in form.__qualname__:
        raise CheckpointError(
            f"native export: {place_of(form)} is defined inside of something; define it at the top of its file"
        )


def _registered(forms: Collection[type[Form]]) -> str:
    """The generated module: `FORMS`, of the forms of this checkpoint."""
    lines = sorted(
        f"from .{file_name(form.__module__).removesuffix('.py')} import {form.__name__}  # noqa: F401"
        for form in forms
    )
    head = '"""The forms that this checkpoint holds; written when it was exported."""\n\n'
    return "\n".join([head + "from .base import REGISTERED as FORMS  # noqa: F401", *lines, ""])


def _shippable(module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports, and the modules of ours that it imports."""
    path = _file_of(module)
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(keepends=True), []
    allowed = ALLOWED | LIBRARIES.get(module, frozenset())
    for each in _imports(source, module):
        if each.module.split(".")[0] in allowed:
            continue
        if not each.module.startswith(f"{PACKAGE}.") and each.module not in BESIDE:
            raise CheckpointError(
                f"native export: {path.name} imports {each.module} (line {each.line}), which a checkpoint cannot bring "
                "along: the file of a form imports torch, the standard library and compress.forms only"
            )
        if not each.shippable:
            raise CheckpointError(
                f"native export: line {each.line} of {path.name} cannot be made a relative import; write "
                f"`from {each.module} import ...` on a line of its own"
            )
        found.append(each.module)
        start = rf"^(\s*from\s+){re.escape(each.module)}(\s+import\b)"
        target = file_name(each.module).removesuffix(".py")
        lines[each.line - 1] = re.sub(start, rf"\1.{target}\2", lines[each.line - 1])
    return "".join(lines), found


def _file_of(module: str) -> Path:
    if module == "__main__":
        raise CheckpointError(
            "native export: the program itself defines a form, which cannot be shipped with the checkpoint; write the "
            "form into a file of its own and import that"
        )
    try:
        return Path(inspect.getfile(sys.modules[module]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"native export: no file defines the module {module}, so that it cannot be shipped with the checkpoint; "
            "write the form into a file of its own"
        ) from error


def _imports(source: str, module: str) -> Sequence[_Import]:
    """Every import of a file, wherever it stands."""
    return _parsed(source, PACKAGE if module.startswith(f"{PACKAGE}.") else "")


@cache
def _parsed(source: str, package: str) -> Sequence[_Import]:
    """Its imports as a module of `package`. Cached by the text itself: every export parses the same files."""
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append(_Import(node.lineno, alias.name, shippable=False))
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                ours = package and node.level == 1
                name = f"{package}.{name}" if ours else f"{'.' * node.level}{name}"
            elif name == PACKAGE:
                name = f"{PACKAGE}.{node.names[0].name}"
            begins = re.match(r"\s*from\s+[\w.]+\s+import\b", lines[node.lineno - 1])
            whole = bool(begins) and (node.module or "") != PACKAGE
            found.append(_Import(node.lineno, name, shippable=whole))
    return tuple(found)
