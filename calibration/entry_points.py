"""Loads what other distributions announce as entry points: whatever is wrong with one is told with its distribution."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path

from calibration.errors import PluginError

_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError),
    *(MemoryError, NameError, OSError, ReferenceError, RuntimeError, SyntaxError, TypeError, ValueError, SystemExit),
)  # fmt: skip
"""All that a module which is imported may end with by its own fault."""


def points(group: str) -> EntryPoints:
    """The entry points of a group that the distributions on `sys.path` announce, read again when its folders change."""
    return _of(group, tuple((place, _changed(place)) for place in sys.path))


@cache
def _of(group: str, places: tuple[tuple[str, int], ...]) -> EntryPoints:
    """Cached as `_choose` is: choosing a group looks at each entry point there is."""
    return _choose(places)(group=group)


@cache
def _choose(_: tuple[tuple[str, int], ...]) -> Callable[..., EntryPoints]:
    """Cached by folders and times of their last changes: it reads a file of every distribution there is."""
    return entry_points().select


def _changed(place: str) -> int:
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:  # a zip file that is gone, a folder not made yet
        return 0


def load(point: EntryPoint) -> None:
    """Import what an entry point names. Raises PluginError naming its distribution if that fails, however it does."""
    try:
        point.load()
    except PluginError as error:
        raise PluginError(f"{told(point)} cannot be loaded: {error}") from error
    except _FAULTS as error:
        raise PluginError(
            f"{told(point)} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall that distribution"
        ) from error


def told(point: EntryPoint) -> str:
    """Where it leads and whose it is, for messages: "my_package.ria:RIA of the distribution my-package"."""
    owner = "an unknown distribution" if point.dist is None else point.dist.name
    return f"{point.value} of the distribution {owner}"
