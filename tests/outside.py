"""Modules and distributions that are not ours, written into a folder and imported from there."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from calibration.statistics import load_statistics
from calibration.statistics.base import STATISTICS
from compress.families.base import METHODS
from compress.forms.base import REGISTERED


@contextmanager
def imported(folder: Path, files: Mapping[str, str]) -> Iterator[list[ModuleType]]:
    """Write modules, name -> text, and import them in this order; what they register goes afterwards, as they do."""
    known = set(load_statistics()), set(METHODS), set(REGISTERED)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield [importlib.import_module(name) for name in files]
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(folder))
        for name in files:
            sys.modules.pop(name, None)
        for name in set(STATISTICS) - known[0]:
            del STATISTICS[name]
        for name in set(METHODS) - known[1]:
            METHODS.forget(name)
        for name in set(REGISTERED) - known[2]:
            if not REGISTERED[name].__module__.startswith("compress."):
                del REGISTERED[name]


def announce(folder: Path, distribution: str, group: str, points: Mapping[str, str]) -> None:
    """Leave in the folder what installing a distribution with these entry points leaves."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
