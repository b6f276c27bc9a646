"""One file a method; see `compress.families.base`."""

import importlib
import pkgutil
from collections.abc import Mapping

from compress.families.base import METHODS, Compressor


def load_methods() -> Mapping[str, type[Compressor]]:
    """Import every module of this package and return the registry."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return METHODS
