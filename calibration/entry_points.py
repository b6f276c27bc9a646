"""Loads what other distributions announce as entry points: whatever is wrong with one is told with its distribution."""

from __future__ import annotations

from importlib.metadata import EntryPoint

from calibration.errors import PluginError

_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError),
    *(MemoryError, NameError, OSError, ReferenceError, RuntimeError, SyntaxError, TypeError, ValueError, SystemExit),
)  # fmt: skip
"""All that a module which is imported may end with by its own fault."""


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
