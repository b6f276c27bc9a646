"""What a user can do wrong, as types: the command line catches exactly these and prints one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from calibration.errors import OptionError, PluginError

__all__ = [
    "CheckpointError",
    "ComparisonError",
    "LayerError",
    "MissingExtraError",
    "PluginError",
    "RecipeError",
    "SweepError",
    "inside",
]


class RecipeError(OptionError):
    """An option, a key or a combination of them that cannot work; the message names it and what would."""


@contextmanager
def inside(option: str) -> Iterator[None]:
    """Within it, options that a RecipeError names are options of `option`, whose path then stands before theirs."""
    try:
        yield
    except RecipeError as error:
        error.option = option if error.option is None else f"{option}.{error.option}"
        raise


class CheckpointError(OptionError):
    """A checkpoint that is not whole, not safe to read, or not what it claims to be."""


class LayerError(RuntimeError):
    """A layer that could not be compressed; the message names the layer and what was found in it."""


class ComparisonError(ValueError):
    """Runs that cannot be put beside each other; the message names them, what differs and both values."""


class SweepError(RuntimeError):
    """Points of a sweep that failed, while others may be done; the message names each with its error."""


class MissingExtraError(ImportError):
    """An optional dependency that is not installed; the message names what needs it and how to install it."""
