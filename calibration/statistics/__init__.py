"""Statistics of what layers read and write during calibration: one file for each, found by walking this folder.

A new statistic is one file, here or anywhere: see `calibration.statistics.base`. Outside packages announce theirs as
entry points of the group `compress.statistics`, whose values are modules.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from calibration.entry_points import load, points, told
from calibration.errors import PluginError
from calibration.statistics.base import OURS, STATISTICS, Collected, Statistic

ENTRY_POINTS = "compress.statistics"


def load_statistics() -> Mapping[str, type[Statistic]]:
    """Import every statistic there is, of this package and of others, and return the registry.

    Raises PluginError naming the distribution whose module cannot be loaded, or lacks the statistic that it announces.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in points(ENTRY_POINTS):
        load(entry)
        if entry.name not in STATISTICS or STATISTICS[entry.name].__module__.startswith(OURS):
            raise PluginError(
                f"{told(entry)} defines no statistic of the name {entry.name!r}: the class's header must say "
                f'name="{entry.name}", which no other statistic has'
            )
    return STATISTICS


def always_collected() -> frozenset[type[Statistic]]:
    """The statistics that are collected whatever the method needs."""
    return frozenset(
        kind for kind in load_statistics().values() if kind.collected is Collected.ALWAYS
    )
